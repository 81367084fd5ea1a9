"""Every activation module of torch.nn: a bound above its measured slope, or a refusal that says why."""

import inspect
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import activation

import opnorm
from network.networks import Lambda
from opnorm.errors import UnsupportedLayerError

WITH_ARGUMENTS: dict[str, list[Callable[[], nn.Module]]] = {
    "Threshold": [lambda: nn.Threshold(0.1, 20.0)],
    "LeakyReLU": [nn.LeakyReLU, lambda: nn.LeakyReLU(2.5), lambda: nn.LeakyReLU(-0.5)],
    "ELU": [nn.ELU, lambda: nn.ELU(3.0), lambda: nn.ELU(0.2)],
    "CELU": [nn.CELU, lambda: nn.CELU(0.3)],
    "GELU": [nn.GELU, lambda: nn.GELU("tanh")],
    "Softplus": [nn.Softplus, lambda: nn.Softplus(3.0, 25.0)],
    "PReLU": [nn.PReLU, lambda: nn.PReLU(6, init=-1.5), lambda: nn.PReLU(6, init=3.0)],
    "RReLU": [nn.RReLU, lambda: nn.RReLU(0.5, 2.5)],
    "Hardtanh": [nn.Hardtanh, lambda: nn.Hardtanh(-3, 0.5)],
    "Softmax": [lambda: nn.Softmax(1)],
    "Softmin": [lambda: nn.Softmin(1)],
    "LogSoftmax": [lambda: nn.LogSoftmax(1)],
    "Softmax2d": [lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 1)), nn.Softmax2d())],
    "GLU": [lambda: nn.GLU(1)],
    "MultiheadAttention": [lambda: Lambda(lambda x, a: a(*[x.unflatten(1, (3, 2))] * 3)[0], _attention())],
}

UNBOUNDED = {
    "Threshold": "jumps",
    "Hardshrink": "jumps",
    "GLU": "give a region",
    "MultiheadAttention": "region|product",
}


def _attention() -> nn.Module:
    return nn.MultiheadAttention(2, 1, batch_first=True)


NAMES = [
    name
    for name in activation.__all__
    if inspect.isclass(getattr(nn, name, None)) and issubclass(getattr(nn, name), nn.Module)
]


def measured(module: nn.Module) -> float:
    """The largest Jacobian norm over a dense scan of the diagonal and random points, in float64."""
    twin = module.double()
    line = torch.linspace(-12, 12, 1201, dtype=torch.float64)[:, None].expand(-1, 6)
    points = torch.cat([line, 3 * torch.randn(200, 6, dtype=torch.float64)]).requires_grad_()
    values: Tensor = twin(points).flatten(1)
    rows = [torch.autograd.grad(column.sum(), points, retain_graph=True)[0] for column in values.mT]
    largest = float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max())
    return largest * (1 - 1e-7)  # torch's backward of hardsigmoid has 1/6 in float32


def test_no_activation_is_forgotten() -> None:
    assert len(NAMES) >= 29
    assert set(WITH_ARGUMENTS) | set(UNBOUNDED) <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "make"), [(n, make) for n in NAMES for make in WITH_ARGUMENTS.get(n, [getattr(nn, n)])]
)
def test_bounded_above_its_slope_or_refused_with_a_reason(name: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().eval()
    try:
        bound = opnorm.lipschitz(module, torch.randn(2, 6), method="fast")
    except UnsupportedLayerError as refusal:
        assert name in UNBOUNDED and "no Lipschitz rule for" in str(refusal)
        return
    if name in UNBOUNDED:
        assert bound.upper == math.inf
        assert any(re.search(UNBOUNDED[name], node.note) for node in bound.nodes)
        return
    slope = measured(module)
    assert bound.lower <= bound.upper
    assert slope <= bound.upper <= (slope + 1e-3) * (2.5 if "Log" in name else 1.05)
