"""Parametrized models are bounded as they are deployed, and left as they are."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import opnorm
from opnorm.certificate.network import verify_network
from opnorm.network.folded import folded

NORMALISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "opnorm": opnorm.spectral_norm,
    "opnorm clip": lambda layer: opnorm.spectral_norm(layer, mode="clip", lipschitz=0.3),
    "torch": nn.utils.parametrizations.spectral_norm,
    "torch's hook": nn.utils.spectral_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


def network(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(6, 8)), nn.ReLU(), wrap(nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")
def test_a_parametrized_model_is_bounded_as_its_plain_twin(name: str, training: bool) -> None:
    model = network(NORMALISED[name]).train()
    model(torch.randn(4, 6)).sum().backward()
    model.train(training)
    state, keys = copy.deepcopy(model.state_dict()), [list(vars(m)) for m in model.modules()]
    x = torch.randn(4, 6)
    bound = opnorm.lipschitz(model, x, method="fast")
    assert model.training == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [list(vars(m)) for m in model.modules()] == keys
    plain, twin = folded(model), network(lambda layer: layer)
    assert set(plain.state_dict()) == set(twin.state_dict())
    twin.load_state_dict(plain.state_dict())
    assert bound.upper == opnorm.lipschitz(twin, x, method="fast").upper
    assert any("parametrized" in remark for remark in bound.remarks)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), twin(x), atol=1e-6)
    for weights in (model, plain, twin.state_dict()):
        assert verify_network(bound.certificate(), weights).upper == bound.certificate().upper


def test_a_plain_model_is_not_copied() -> None:
    model = network(lambda layer: layer)
    assert folded(model) is model
    assert not opnorm.lipschitz(model, torch.randn(2, 6), method="fast").remarks
