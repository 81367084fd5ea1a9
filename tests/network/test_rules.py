"""Slopes against mpmath, unbounded operations with their reason, rules of one's own, and regions."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.certificate.network.activations import FIXED, slopes_between
from opnorm.certificate.network.program import slopes
from opnorm.errors import ArgumentError
from opnorm.network import Ball, Box, NormBall, register_rule

SMOOTH: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_slopes_enclose_the_derivative_closely(kind: str) -> None:
    grid = [mpmath.mpf(i) / 50 for i in range(-400, 401)]
    derivatives = [mpmath.diff(SMOOTH[kind], x) for x in grid]
    low, high = FIXED[kind]
    assert low <= min(derivatives)
    assert max(derivatives) <= high
    assert max(derivatives) >= high - 1e-3
    assert min(derivatives) <= low + 1e-3


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_slopes_on_an_interval_enclose_the_derivative(kind: str) -> None:
    for low, high in ((-3.0, -1.0), (-0.5, 2.0), (1.0, 1.0), (20.0, 30.0)):
        ends = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
        a, b = slopes_between(kind, *ends, slopes(*FIXED[kind]))
        for i in range(11):
            with mpmath.workdps(50):
                derivative = mpmath.diff(SMOOTH[kind], mpmath.mpf(low) + (mpmath.mpf(high) - low) * i / 10)
            assert float(a) <= derivative <= float(b)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "prelu"])
def test_slopes_on_an_interval_enclose_those_of_each_side(kind: str, slope: float) -> None:
    left = 0.0 if kind == "relu" else slope
    whole = slopes(min(left, 1.0), max(left, 1.0))
    for low, high, met in ((-2.0, -1.0, {left}), (1.0, 2.0, {1.0}), (-1.0, 1.0, {left, 1.0}), (0.0, 1.0, {left, 1.0})):
        ends = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
        a, b = slopes_between(kind, *ends, whole)
        assert (float(a), float(b)) == (min(met), max(met))


@pytest.mark.parametrize(
    "function",
    [torch.exp, torch.square, lambda x: x * x, lambda x: x**3, lambda x: x / (x + 1), torch.sqrt, nn.Hardshrink()],
)
def test_unbounded_operations_are_infinite_with_a_reason(function: Callable[[Tensor], Tensor]) -> None:
    bound = opnorm.lipschitz(Lambda(function), torch.rand(2, 3) + 1)
    assert bound.upper == math.inf
    assert any(node.note for node in bound.nodes)


def test_a_rule_of_ones_own_is_used() -> None:
    @torch.library.custom_op("opnorm_tests::half_sine", mutates_args=())
    def half_sine(x: Tensor) -> Tensor:
        return torch.sin(x) / 2

    @half_sine.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @register_rule("opnorm_tests.half_sine.default")
    def rule(node, build):  # type: ignore[no-untyped-def]
        return build.opaque(node, (build.source(node.args[0], node),), 0.5, "sin / 2 has slopes in [-1/2, 1/2]")

    bound = opnorm.lipschitz(Lambda(half_sine), torch.randn(2, 3))
    assert bound.upper == pytest.approx(0.5)
    assert any("1/2" in line for line in bound.certificate().assumptions)


REGIONAL = {
    "gate": (Lambda(lambda x: x * torch.sigmoid(x)), (4,)),
    "square": (Lambda(lambda x: (x**2).sum(1, keepdim=True)), (4,)),
    "exp": (Lambda(torch.exp), (3,)),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (4,)),
    "instance norm": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2)), (2, 3, 3)),
    "group norm": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), (4, 2, 2)),
    "rms norm": (nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4, eps=1e-6)), (3, 4)),
    "attention": (
        Lambda(lambda x, a: nn.functional.scaled_dot_product_attention(*a(x).chunk(3, -1)), nn.Linear(3, 9)),
        (4, 3),
    ),
    "mlp": (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), (4,)),
}


@pytest.mark.parametrize("name", REGIONAL)
@pytest.mark.parametrize("radius", [1e-3, 0.3])
def test_bounds_on_a_region_hold_inside_it(name: str, radius: float) -> None:
    torch.manual_seed(1)
    model, shape = REGIONAL[name]
    center = torch.randn(shape)
    twin = model.double()
    offsets = torch.randn(20, *shape, dtype=torch.float64)
    sizes = offsets.flatten(1).norm(dim=1).reshape(-1, *([1] * len(shape)))
    inside = center.double() + offsets / sizes * radius * torch.rand(sizes.shape, dtype=torch.float64) * (1 - 1e-9)
    whole = NormBall(float(center.norm()) + radius)
    for region in (whole,) if radius > 0.1 else (Ball(center, radius), Box(center - radius, center + radius)):
        bound = opnorm.lipschitz(model.float(), center[None], region=region, method="fast")
        assert bound.lower <= bound.upper < math.inf
        model.double()
        for x in inside:
            jacobian = torch.autograd.functional.jacobian(lambda v: twin(v)[0].reshape(-1), x[None])
            measured = float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)) * (1 - 1e-6)
            assert measured <= bound.upper


def test_regions_are_checked() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3)
    for region in (Ball(torch.zeros(2), 1.0), Ball(torch.zeros(3), 0.0), Box(torch.ones(3), torch.zeros(3)), "here"):
        with pytest.raises(ArgumentError):
            opnorm.lipschitz(model, x, region=region)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="method"):
        opnorm.lipschitz(model, x, method="magic")
    with pytest.raises(ArgumentError, match="guarantee"):
        opnorm.lipschitz(model, x, guarantee="probable")
