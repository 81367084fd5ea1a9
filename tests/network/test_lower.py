"""The lower end: proved where every rounding is bounded, checked against exact rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import DENSE, IMAGES
from opnorm.graph import export
from opnorm.network.forward_error import distance_up, proved_quotient
from opnorm.network.lower import Function

NETS = {n.name: n for n in DENSE + IMAGES}
PROVED = [
    "mlp", "badly scaled", "near rank one", "residual", "maxmin", "dense block", "subtract", "slices", "stack",
    "cnn", "resnet", "stride", "max pool", "avg pool", "groups", "transposed", "padding layers", "3d", "pixel shuffle",
]  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_piecewise_linear_networks_have_a_proved_lower_end(name: str) -> None:
    net = NETS[name]
    bound = opnorm.lipschitz(net.build(), torch.randn(4, *net.shape), method="naive", time_budget=1.0)
    assert bound.pair is not None
    assert bound.pair.guarantee == "proved"
    assert 0 < bound.lower <= bound.upper


@pytest.mark.parametrize("name", ["softmax", "tokens", "layer norm"])
def test_library_functions_leave_an_estimate(name: str) -> None:
    net = NETS[name]
    bound = opnorm.lipschitz(net.build(), torch.randn(4, *net.shape), method="naive", time_budget=1.0)
    assert bound.pair is not None
    assert bound.pair.guarantee == "estimate"


def exact_squared_quotient(model: nn.Sequential, x: Tensor, y: Tensor) -> Fraction:
    """The squared quotient in rational arithmetic."""

    def value(v: Tensor) -> list[Fraction]:
        h = [Fraction(t) for t in v.tolist()]
        for layer in model:
            if isinstance(layer, nn.Linear):
                rows = [[Fraction(w) for w in row] for row in layer.weight.double().tolist()]
                bias = [Fraction(b) for b in layer.bias.double().tolist()]
                h = [sum((w * t for w, t in zip(row, h, strict=True)), b) for row, b in zip(rows, bias, strict=True)]
            elif isinstance(layer, nn.LeakyReLU):
                h = [t if t > 0 else Fraction(layer.negative_slope) * t for t in h]
            else:
                h = [max(t, Fraction(0)) for t in h]
        return h

    top = sum((a - b) ** 2 for a, b in zip(value(x), value(y), strict=True))
    return top / sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))


@pytest.mark.parametrize("step", [1.0, 1e-4, 1e-10])
@pytest.mark.parametrize(("offset", "act"), [(0.0, nn.LeakyReLU(0.3)), (1e4, nn.ReLU()), (1e4, nn.LeakyReLU(-1.5))])
def test_below_the_exact_quotient_of_the_pair_and_close(step: float, offset: float, act: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), act, nn.Linear(4, 2)).double()
    x = torch.randn(3, dtype=torch.float64) + offset
    model[4].bias.data -= model(x).detach()  # large terms that cancel: the output's size hides no error
    function = Function(export(model, torch.randn(2, 3).double()), (torch.randn(2, 3),))
    for _ in range(20):
        y = x + step * torch.randn(3, dtype=torch.float64)
        with torch.no_grad():
            below = proved_quotient(function.graph, function.inputs(torch.stack([x, y])), distance_up(x, y))
        exact = exact_squared_quotient(model, x, y)
        assert below is not None
        assert Fraction(below) ** 2 <= exact
        if step >= 1e-4 and offset == 0:
            assert below >= float(exact) ** 0.5 * (1 - 1e-7)
