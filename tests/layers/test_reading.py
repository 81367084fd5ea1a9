"""The weight that is measured is the one that the module uses, and reading it changes nothing."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from cases import matrix_of
from opnorm.errors import UnsupportedLayerError
from opnorm.layers import to_operator


def _legacy_spectral(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(layer)


def _legacy_weight(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


WRAPPERS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "legacy spectral_norm": _legacy_spectral,
    "legacy weight_norm": _legacy_weight,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.3), "weight", 0.3),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    layer = WRAPPERS[request.param](nn.Linear(5, 4))
    with torch.no_grad():  # as an optimizer step does: what the last call computed is stale now
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def test_the_weight_is_the_fresh_one(wrapped: nn.Module) -> None:
    wrapped.eval()
    measured = to_operator(wrapped).weight
    torch.testing.assert_close(measured, matrix_of(wrapped, (5,), torch.float32), rtol=1e-5, atol=1e-6)


def test_reading_changes_nothing(wrapped: nn.Module) -> None:
    wrapped.train()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    hooks = len(wrapped._forward_pre_hooks)
    to_operator(wrapped)
    after = wrapped.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(part.training for part in wrapped.modules())
    assert len(wrapped._forward_pre_hooks) == hooks


def test_a_parametrization_that_fails_leaves_the_mode_as_it_was() -> None:
    class Fails(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise ZeroDivisionError
            return weight

    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Fails())
    with pytest.raises(ZeroDivisionError):
        to_operator(layer)
    assert all(part.training for part in layer.modules())


def test_a_cached_weight_is_not_trusted() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 2)).eval()
    with parametrize.cached():
        stale = layer.weight
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(3)
        torch.testing.assert_close(to_operator(layer).weight, 3 * stale)


def test_weights_are_detached() -> None:
    assert not to_operator(nn.Linear(2, 2)).weight.requires_grad
    assert not to_operator(parametrizations.weight_norm(nn.Conv1d(2, 2, 3))).weight.requires_grad


def test_a_hook_beside_torchs_own_is_refused() -> None:
    layer = _legacy_weight(nn.Linear(3, 2))
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    with pytest.raises(UnsupportedLayerError, match="forward hooks"):
        to_operator(layer)


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_sharded_weights_are_gathered(one_rank: DeviceMesh) -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    fully_shard(layer, mesh=one_rank)
    assert torch.equal(to_operator(layer).weight, weight)
    layer.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    with pytest.raises(UnsupportedLayerError, match=r"FSDPLinear has forward hooks \(.*lambda>\)"):
        to_operator(layer)
