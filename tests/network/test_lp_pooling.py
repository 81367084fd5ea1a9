"""Power-average pooling against measured Jacobians and explicit pairs."""

import math

import pytest
import torch
from torch import nn

import opnorm

POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.LPPool1d(2, 3, 2), (2, 9)),
    "2d overlapping": (nn.LPPool2d(2, 3, 1), (1, 5, 5)),
    "2d apart": (nn.LPPool2d(4, 2), (2, 4, 4)),
    "3d": (nn.LPPool3d(2, 2), (1, 4, 4, 4)),
    "p = 1": (nn.LPPool1d(1, 3), (1, 9)),
    "cut windows": (nn.LPPool2d(2, 3, 2, ceil_mode=True), (1, 6, 6)),
    "odd after relu": (nn.Sequential(nn.ReLU(), nn.LPPool2d(3, 2)), (1, 4, 4)),
    "fractional after relu": (nn.Sequential(nn.ReLU(), nn.LPPool2d(1.5, (3, 2), 1)), (1, 4, 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_above_measured_slopes_and_close(name: str) -> None:
    torch.manual_seed(0)
    model, shape = POOLS[name]
    bound = opnorm.lipschitz(model, torch.rand(4, *shape) + 0.1, method="fast").upper
    twin, best = model.double(), 0.0
    points = [torch.rand(shape).double() + 0.05 for _ in range(20)] + [torch.ones(shape).double()]
    for i in range(math.prod(shape)):  # a spike reaches every window that it is in
        point = torch.full(shape, 1e-3).double()
        point.view(-1)[i] = 1.0
        points.append(point)
    for x in points:
        jacobian = torch.autograd.functional.jacobian(lambda v: twin(v[None])[0].reshape(-1), x)
        best = max(best, float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)))
    assert best * (1 - 1e-9) <= bound <= 1.3 * best


@pytest.mark.parametrize(("p", "reason"), [(3, "not negative"), (1.5, "not negative"), (0.5, "unbounded")])
def test_powers_without_a_constant_say_so(p: float, reason: str) -> None:
    bound = opnorm.lipschitz(nn.LPPool2d(p, 2), torch.rand(2, 1, 4, 4))
    assert bound.upper == math.inf
    assert any(reason in node.note for node in bound.nodes)


def test_signed_cubes_are_not_lipschitz() -> None:
    pool = nn.LPPool1d(3, 2).double()
    x, y = (
        torch.tensor([[[1.0, -1 + 1e-9]]], dtype=torch.float64),
        torch.tensor([[[1.0, -1 + 2e-9]]], dtype=torch.float64),
    )
    assert float((pool(x) - pool(y)).norm() / (x - y).norm()) > 1e5


def test_another_power_of_an_average_is_no_pooling() -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.avg_pool1d(x**2, 2)
            return (torch.sign(y) * torch.relu(torch.abs(y))).mul(3).pow(0.5)

    assert opnorm.lipschitz(Other(), torch.rand(2, 1, 4)).upper == math.inf
