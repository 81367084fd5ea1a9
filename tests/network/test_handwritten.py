"""Normalisations and gates in single operations: bounded as a whole; what only looks like one is not."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.network import Ball


def layer_norm_2d(x: Tensor) -> Tensor:
    """ConvNeXt's."""
    mean = x.mean(1, keepdim=True)
    spread = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(spread + 0.01)


def rms_norm(x: Tensor) -> Tensor:
    """Llama's."""
    kind = x.dtype
    x = x.to(torch.float32)
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01)).to(kind)


def annotated(x: Tensor) -> Tensor:
    """The Annotated Transformer's."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1)


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], float]] = {
    "layer norm of channels": (layer_norm_2d, (3, 2, 2), 10.0),
    "rms norm": (rms_norm, (2, 4), 10.0),
    "by a deviation": (annotated, (5,), 10.0),
    "by a variance": (
        lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 0.01), (5,), 10.0
    ),
    "by an unbiased variance": (
        lambda x: (x - x.mean((1, 2), True)) / torch.sqrt(x.var((1, 2), keepdim=True) + 0.01), (2, 3), 10.0
    ),
    "pixel norm": (lambda x: x * (x.square().mean(1, keepdim=True) + 0.01) ** -0.5, (3, 2, 2), 10.0),
    "F.normalize": (lambda x: F.normalize(x, dim=1, eps=0.1), (4,), 10.0),
    "by a norm and a little": (lambda x: x / (x.norm(dim=1, keepdim=True) + 0.1), (4,), 10.0),
}  # fmt: skip

GATES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "swish": (lambda x: x * torch.sigmoid(x), 1.0998394),
    "quick gelu": (lambda x: torch.sigmoid(1.702 * x) * x, 1.0998394),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), 1.0884982),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), 1.1289042),
    "gelu, another order": (lambda x: x * 0.5 * (torch.erf(x * 0.7071067811865475) + 1.0), 1.1289042),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))), 1.1289931
    ),
    "gelu by tanh, rounded": (lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))), 1.1289931),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, 1.5),
    "twice": (lambda x: -2 * x * torch.sigmoid(-3 * x), 2.1996788),
}  # fmt: skip

# No normalisation and no gate: unbounded, or another statistic than that of what is divided.
NEITHER: dict[str, Callable[[Tensor], Tensor]] = {
    "another tensor's norm": lambda x: x / (x.flip(1).norm(dim=1, keepdim=True) + 0.1),
    "squares of another": lambda x: x / torch.sqrt(x[:, :2].square().mean(1, keepdim=True) + 0.01),
    "not centred": lambda x: x / torch.sqrt(x.var(1, keepdim=True) + 0.01),
    "other axes": lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var((1,), keepdim=True) - 0.01),
    "times the root": lambda x: x * torch.sqrt(x.square().mean(1, keepdim=True) + 0.01),
    "no eps": lambda x: x / torch.sqrt(x.square().mean(1, keepdim=True) + 0.0),
    "a gate of another": lambda x: x * torch.sigmoid(x.flip(1)),
    "a shifted gate": lambda x: x * torch.sigmoid(x + 1),
    "cubed": lambda x: x * x * torch.sigmoid(x),
    "another cube": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3))),
    "two plus": lambda x: x * (2 + torch.erf(x)),
    "times a square": lambda x: x * (1 + torch.erf(x * x)),
    "a shifted quotient": lambda x: x * torch.sigmoid(1 / x),
}


def steepest(function: Callable[[Tensor], Tensor], points: Tensor) -> float:
    def flat(x: Tensor) -> Tensor:
        return function(x[None]).reshape(-1)

    jacobians = [torch.autograd.functional.jacobian(flat, x).reshape(-1, x.numel()) for x in points]
    return max(float(torch.linalg.matrix_norm(j, 2)) for j in jacobians)


@pytest.mark.parametrize("name", NORMS)
def test_normalisations_are_bounded_by_their_eps(name: str) -> None:
    torch.manual_seed(0)
    function, shape, constant = NORMS[name]
    bound = opnorm.lipschitz(Lambda(function), torch.randn(4, *shape), method="fast", time_budget=0.3)
    near = torch.cat([s * torch.randn(10, *shape) for s in (1e-4, 1e-2, 0.1, 1.0)]).double()
    slope = steepest(function, near) * (1 - 1e-6)  # one of them computes in float32
    assert 0.8 * bound.upper <= slope <= bound.upper <= constant * (1 + 1e-6)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "InstanceNorm": (nn.InstanceNorm2d(3), (3, 4, 4)),
    "GroupNorm": (nn.GroupNorm(2, 4), (4, 3, 3)),
    "RMSNorm": (nn.RMSNorm(8, eps=1e-6), (3, 8)),
    "LayerNorm over two axes": (nn.LayerNorm((3, 8)), (3, 8)),
    "F.normalize over channels": (Lambda(lambda x: F.normalize(x, dim=1)), (4, 3, 3)),
}


@pytest.mark.parametrize("name", NORMS | LAYERS)
def test_on_a_region_a_normalisation_is_bounded_by_the_size_of_what_it_divides(name: str) -> None:
    torch.manual_seed(0)
    model, shape = (Lambda(NORMS[name][0]), NORMS[name][1]) if name in NORMS else LAYERS[name]
    model = model.double().eval()
    center = torch.randn(*shape, dtype=torch.float64) + 0.3
    for radius, ratio in ((1e-3, 1.02), (0.2, 3.0)):
        offsets = torch.randn(20, *shape, dtype=torch.float64).flatten(1)
        inside = center + (offsets / offsets.norm(dim=1, keepdim=True) * radius * (1 - 1e-9)).reshape(-1, *shape)
        bound = opnorm.lipschitz(model, center[None], region=Ball(center, radius), method="fast", time_budget=0.2)
        slope = steepest(model, inside) * (1 - 1e-6)  # one of them computes in float32
        assert slope <= bound.upper < ratio * slope


@pytest.mark.parametrize("name", GATES)
def test_gates_have_the_slopes_of_their_activation(name: str) -> None:
    function, constant = GATES[name]
    bound = opnorm.lipschitz(Lambda(function), torch.randn(4, 3), method="naive", time_budget=0.3)
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    (slopes,) = torch.autograd.grad(function(line).sum(), line)
    assert float(slopes.abs().max()) <= bound.upper <= constant * (1 + 1e-9)
    if name != "hardswish":
        assert float(slopes.abs().max()) >= 0.999 * bound.upper


@pytest.mark.parametrize("name", NEITHER)
def test_what_only_looks_like_one_is_not_taken_for_it(name: str) -> None:
    assert (
        opnorm.lipschitz(Lambda(NEITHER[name]), torch.rand(4, 3) + 1, method="naive", time_budget=0.2).upper == math.inf
    )
