"""A folded model exports to the same graph as a plain one: the same operations, and not a byte more of weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

import opnorm

param = nn.utils.parametrizations.spectral_norm


class Residual(nn.Module):
    """A block with a skip, its parts tied into one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(torch.relu(self.conv(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


MODELS = {
    "convolutions and linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)),
        (3, 8, 8),
    ),
    "depthwise and transposed": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ConvTranspose2d(4, 2, 4, 2, 1)),
        (4, 8, 8),
    ),
    "residual with batch norm": (Residual, (4, 8, 8)),
    "attention": (Attention, (5, 8)),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).to(torch.bfloat16), (8,)),
}
CASES = pytest.mark.parametrize("name", MODELS)


def plain_and_folded(name: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    example = torch.randn(2, *shape).to(next(plain.parameters()).dtype)
    plain(example)  # running statistics other than 0 and 1, which the exporter would share with other zeros and ones
    plain.eval()
    trained = opnorm.normalize(copy.deepcopy(plain), example).train()
    trained(example).square().mean().backward()
    folded = opnorm.fold(trained.eval())
    assert not torch.equal(folded(example), plain(example))
    return plain, folded, (example,)


def bytes_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


@CASES
def test_exported_programs(name: str) -> None:
    plain, folded, example = plain_and_folded(name)
    expected, found = torch.export.export(plain, example), torch.export.export(folded, example)
    assert [(n.op, str(n.target)) for n in found.graph.nodes] == [(n.op, str(n.target)) for n in expected.graph.nodes]
    assert bytes_of(found.state_dict) == bytes_of(expected.state_dict)
    assert bytes_of(found.constants) == bytes_of(expected.constants)
    torch.testing.assert_close(found.module()(*example), folded(*example))


def test_the_export_of_torchs_parametrization_carries_its_vectors() -> None:
    plain, _, example = plain_and_folded("convolutions and linear")
    theirs = copy.deepcopy(plain)
    for i in (0, 3):
        param(theirs[i])
    found, expected = torch.export.export(theirs.eval(), example), torch.export.export(plain, example)
    assert len(found.graph.nodes) > 2 * len(expected.graph.nodes)
    assert sum(bytes_of(found.state_dict).values()) > sum(bytes_of(expected.state_dict).values())


# The exporter itself calls what it has deprecated.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", ["convolutions and linear", "residual with batch norm"])
def test_onnx(name: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    plain, folded, example = plain_and_folded(name)

    def exported(model: nn.Module) -> tuple[list[str], dict[str, int], int]:
        program = torch.onnx.export(model, example, dynamo=True, verbose=False)
        assert program is not None
        proto = program.model_proto
        weights = {tensor.name: len(tensor.raw_data) for tensor in proto.graph.initializer}
        return [node.op_type for node in proto.graph.node], weights, proto.ByteSize()

    operations, weights, size = exported(folded)
    plain_operations, plain_weights, plain_size = exported(plain)
    assert (operations, weights) == (plain_operations, plain_weights)
    assert size <= 1.01 * plain_size
