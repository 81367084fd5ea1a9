"""What is no map of one sample, or depends on chance, is refused with a reason."""

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.errors import ArgumentError, UnsupportedLayerError
from opnorm.graph import export


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x - x.mean(0, keepdim=True), "mixes the samples"),
        (lambda x: x @ x.T, "mixes the samples"),
        (lambda x: x.flip(0), "mixes the samples"),
        (lambda x: x.roll(1, 0), "mixes the samples"),
        (lambda x: torch.softmax(x, 0), "mixes the samples"),
        (lambda x: x.sum().expand(x.shape[0], 1), "mixes the samples"),
        (lambda x: x.reshape(4, -1), "batch"),
        (lambda x: x.reshape(-1), "batch|output"),
    ],
)
def test_mixing_samples_is_an_error(function: object, reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        bound = opnorm.lipschitz(Lambda(function), torch.randn(2, 8), method="naive")
        assert bound.product == 1.0  # a batch merged into one axis is no mixture
        raise UnsupportedLayerError("batch merged")


def test_training_mode_is_refused() -> None:
    for layer in (nn.BatchNorm1d(4), nn.Dropout()):
        with pytest.raises(ArgumentError, match=r"0 .*training mode.*eval"):
            export(nn.Sequential(layer).train(), torch.randn(2, 4))


def test_inputs_are_checked() -> None:
    with pytest.raises(ArgumentError, match="batch"):
        export(nn.Linear(3, 3), torch.tensor(1.0))
    with pytest.raises(ArgumentError, match="NaN"):
        export(nn.Linear(3, 3), torch.full((1, 3), float("nan")))


def test_an_unknown_operation_is_named_with_its_place_and_the_way_out() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(UnsupportedLayerError, match=r"bessel_j0.* in 1 \(Odd\).*register_rule"):
        opnorm.lipschitz(nn.Sequential(nn.Linear(2, 2), Odd()), torch.randn(1, 2))


def test_recurrent_layers_are_unrolled_step_by_step() -> None:
    graph = export(Lambda(lambda x, lstm: lstm(x)[0], nn.LSTM(3, 4, batch_first=True)).eval(), torch.randn(2, 5, 3))
    operations = [node.op for node in graph.nodes]
    assert operations.count("aten.tanh.default") == 2 * 5
    assert not any("lstm" in operation for operation in operations)


def test_a_batch_of_one_is_enough_and_names_are_kept() -> None:
    graph = export(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 3))
    assert set(graph.weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [n.path for n in graph.nodes[1:]] == ["0", "1", "2"]
    assert all(n.batch_axis == 0 and n.merged == 1 for n in graph.nodes)


def test_in_place_operations_are_seen_through_every_name() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h[:, :2].mul_(100.0)
            return h

    torch.manual_seed(0)
    model = InPlace()
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], torch.zeros(4))
    try:
        upper = opnorm.lipschitz(model, torch.randn(2, 4), method="naive").upper
    except UnsupportedLayerError:
        return
    assert upper >= float(torch.linalg.matrix_norm(jacobian, 2)) * (1 - 1e-6)
