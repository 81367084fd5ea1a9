"""Bounds on a region at its extremes: where nothing moves, where a sign is decided by rounding, at every scale."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.certificate.network import program
from opnorm.certificate.network.region import norm_up
from opnorm.certificate.network.stages import composite
from opnorm.network import Ball, Box, NormBall


def wide(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double().eval()


def all_off() -> nn.Module:
    model = wide(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].bias.data.fill_(-9.0)
    return model


def dead_in_two_layers() -> nn.Module:
    """No layer is dead as a whole, but what moves in the first one is not read by what moves in the second one."""
    model = wide(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].bias.data.copy_(torch.tensor([-9.0, 9.0]))
    model[2].weight.data.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    model[2].bias.data.copy_(torch.tensor([9.0, -99.0]))
    return model


def off_rnn() -> nn.Module:
    layer = nn.RNN(2, 3, 2, "relu", batch_first=True)
    for name, value in layer.named_parameters():
        value.data.fill_(-9.0 if "bias" in name else 0.1)
    return Lambda(lambda x, m: m(x)[0], layer).double().eval()


DEAD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "all off": (all_off, (2,)),
    "in two layers": (dead_in_two_layers, (2,)),
    "rnn": (off_rnn, (3, 2)),
}


@pytest.mark.parametrize("name", DEAD)
def test_where_the_network_is_constant_the_bound_is_0_itself(name: str) -> None:
    torch.manual_seed(0)
    make, shape = DEAD[name]
    center = torch.zeros(shape, dtype=torch.float64)
    bound = opnorm.lipschitz(make(), center[None], region=Ball(center, 0.1), method="fast", time_budget=0.2)
    assert bound.upper == 0.0
    assert "0 <= Lipschitz constant <= 0\n" in str(bound)


def test_a_region_of_one_point_has_the_bound_0_and_one_of_radius_0_is_refused() -> None:
    point = torch.zeros(2, dtype=torch.float64)
    model = wide(nn.Linear(2, 2), nn.Tanh())
    assert opnorm.lipschitz(model, point[None], region=Box(point, point), time_budget=0.2).upper == 0.0
    with pytest.raises(opnorm.errors.ArgumentError, match="positive"):
        opnorm.lipschitz(model, point[None], region=Ball(point, 0.0))


def cancelling_norm() -> nn.Module:
    """BatchNorm's shift is 8.7e-12, but float64 computes -1.6e-11: the ReLU behind it is on."""
    norm = nn.BatchNorm1d(1, eps=0.0).double().eval()
    norm.running_mean.fill_(500848.4746493213)
    norm.running_var.fill_(6.7723202587262605)
    norm.bias.data.fill_(192458.72827158638)
    return wide(norm, nn.ReLU())


def tiny_shifts() -> nn.Module:
    """On at -2e-180 + 1e-170 x, but not at 0."""
    model = wide(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU())
    for layer, bias in ((model[0], 1e-180), (model[2], -2e-180)):
        layer.weight.data.fill_(1.0)
        layer.bias.data.fill_(bias)
    return model


SLOPES: dict[str, tuple[Callable[[], nn.Module], float, float]] = {
    "a shift that cancels": (cancelling_norm, 1e-13, 6.7723202587262605**-0.5),
    "numbers whose squares underflow": (tiny_shifts, 1e-170, 1.0),
    "a kink in the centre": (lambda: wide(nn.ReLU()), 1e-300, 1.0),
    "products that overflow": (lambda: wide(nn.ReLU(), nn.Tanh()), 1e308, 1.0),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_that_rounding_must_not_hide(name: str) -> None:
    make, radius, slope = SLOPES[name]
    center = torch.zeros(1, dtype=torch.float64)
    for region in (Ball(center, radius), NormBall(radius), Box(center - radius, center + radius)):
        bound = opnorm.lipschitz(make(), center[None], region=region, method="naive", time_budget=0.2)
        assert slope * (1 - 1e-15) <= bound.upper < 1.001


@pytest.mark.parametrize("scale", [5e-324, 1e-320, 1e-200, 1e-160, 1.0, 1e200])
def test_norms_of_distances_hold_at_every_scale(scale: float) -> None:
    values = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(0.5).mul(scale)
    exact = sum(Fraction(v) ** 2 for v in values.tolist())
    assert Fraction(norm_up(values)) ** 2 >= exact > 0
    assert norm_up(values) <= math.hypot(*values.tolist()) * (1 + 1e-9) + 1e-322


def quotients(model: nn.Module, center: Tensor, radius: float) -> float:
    """The largest difference quotient and Jacobian norm that were met in a ball."""
    offsets = torch.randn(400, *center.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = center + radius * offsets / offsets.flatten(1).norm(dim=1).reshape(-1, *[1] * center.dim())
    with torch.no_grad():
        moved = (model(points[::2]) - model(points[1::2])).flatten(1).norm(dim=1)
        best = float((moved / (points[::2] - points[1::2]).flatten(1).norm(dim=1)).max())
    for point in points[:5]:
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0].reshape(-1), point)
        best = max(best, float(torch.linalg.matrix_norm(jacobian.reshape(-1, point.numel()), 2)))
    return best * (1 - 1e-9)


@pytest.mark.parametrize(("kind", "radius"), [(nn.LSTM, 0.03), (nn.GRU, 1.0), (nn.LSTM, 1e6)])
def test_a_recurrent_layer_on_a_region_is_no_worse_than_everywhere(kind: type[nn.Module], radius: float) -> None:
    torch.manual_seed(0)
    model = Lambda(lambda x, m: m(x)[0][:, -1], kind(3, 4, batch_first=True)).double().eval()
    center = torch.randn(3, 3, dtype=torch.float64)
    everywhere = opnorm.lipschitz(model, center[None], method="fast", time_budget=0.2)
    near = opnorm.lipschitz(model, center[None], method="fast", region=Ball(center, radius), time_budget=0.2)
    assert quotients(model, center, radius) <= near.upper <= everywhere.upper * (1 + 1e-6)
    assert everywhere.upper < everywhere.product / 2
    if radius == 0.03:
        assert near.upper < 3 * near.lower
        opnorm.verify(everywhere.certificate(), dict(model.state_dict()))


def test_the_slopes_of_two_functions_in_a_row_hold_all_products() -> None:
    torch.manual_seed(0)
    ends = torch.randn(2, 2, 50, dtype=torch.float64).sort(1).values
    ends[0, :, 0] = torch.tensor([0.0, 1.0])
    steps = [
        program.Input((), (50,), ""),
        *(program.Elementwise((i,), (50,), "", low, high) for i, (low, high) in enumerate(ends)),
    ]
    low, high = composite(program.Program(tuple(steps), (2,)), 1, 2, {})
    for j in range(50):
        corners = [Fraction(float(a)) * Fraction(float(b)) for a in ends[0, :, j] for b in ends[1, :, j]]
        assert Fraction(float(low[j])) <= min(corners)
        assert Fraction(float(high[j])) >= max(corners)
        assert float(high[j] - low[j]) <= float(max(corners) - min(corners)) + 1e-14
    assert torch.equal(
        torch.stack([low[0], high[0]]), torch.stack([ends[1, 0, 0].clamp(max=0), ends[1, 1, 0].clamp(min=0)])
    )


IN_PLACE: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "tanh": lambda x, a: 2 * x - 2 * a(x).tanh_(),
    "sigmoid": lambda x, a: 2 * x - 9 * a(x).sigmoid_(),
    "a sum": lambda x, a: torch.tanh(a(x).add_(x)) - x,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_in_place_leaves_the_value_that_was_read(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.eye(2), torch.full((2,), 1.5)
    model = Lambda(IN_PLACE[name], layer).double().eval()
    center = torch.zeros(2, dtype=torch.float64)
    bound = opnorm.lipschitz(model, center[None], region=Ball(center, 1e-3), method="fast", time_budget=0.2)
    found = opnorm.verify(bound.certificate(), model)
    assert quotients(model, center, 1e-3) <= min(bound.upper, found.upper)


@pytest.mark.parametrize("function", [torch.exp, torch.expm1, torch.exp2, torch.sinh, torch.cosh])
def test_the_slopes_of_exp_are_not_those_of_its_relatives(function: Callable[[Tensor], Tensor]) -> None:
    center = torch.full((2,), -3.0, dtype=torch.float64)
    model = Lambda(function)
    bound = opnorm.lipschitz(model, center[None], region=Ball(center, 0.01), method="fast", time_budget=0.2)
    assert quotients(model, center, 0.01) <= bound.upper
    assert math.isinf(bound.upper) == (function not in (torch.exp, torch.expm1))
