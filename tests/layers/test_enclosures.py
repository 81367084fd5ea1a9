"""The norm of every layer lies in its enclosure, at its own size and, where that exists, for every size."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import nn

from cases import LAYERS, WEIGHTED, WEIGHTS, Case, assert_encloses, by_name, module_matrix
from opnorm import norm
from opnorm.operators import Composed, Dense, Diagonal, Scaled


@pytest.mark.parametrize("case", **by_name(LAYERS))
def test_every_layer_is_enclosed(case: Case) -> None:
    module = case.build()
    found = norm(module, input_shape=case.shape)
    assert_encloses(found.lower, found.upper, module_matrix(module, case.shape))
    assert found.guarantee == "proved"
    assert found.met


@pytest.mark.parametrize("fill", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("case", **by_name(WEIGHTED[2::3]))
def test_adversarial_weights_are_enclosed(case: Case, fill) -> None:
    module = case.build(fill)
    found = norm(module, input_shape=case.shape)
    assert_encloses(found.lower, found.upper, module_matrix(module, case.shape))


def _batch_norm() -> nn.Module:
    layer = nn.BatchNorm1d(3, eps=0.1).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -3.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.7, 3.3, 1.9]))
    return layer


EXACT: list[tuple[Callable[[], nn.Module], tuple[int, ...] | None, Fraction]] = [
    (lambda: nn.AdaptiveAvgPool1d(1), (2, 3), Fraction(1, 3)),
    (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 5), Fraction(1, 15)),
    (lambda: nn.AvgPool1d(3), (1, 9), Fraction(1, 3)),
    (lambda: nn.AvgPool2d(3), (1, 9, 3), Fraction(1, 9)),
    (lambda: nn.AvgPool2d((1, 3), divisor_override=7), (1, 1, 3), Fraction(3, 49)),
    (lambda: nn.Upsample(scale_factor=3), (1, 5), Fraction(3)),
    (lambda: nn.Upsample(scale_factor=(2, 4)), None, Fraction(8)),
    (lambda: nn.ReplicationPad1d((2, 4)), (1, 3), Fraction(5)),
    (lambda: nn.CircularPad1d((1, 0)), (1, 3), Fraction(2)),
    (lambda: nn.PixelShuffle(2), None, Fraction(1)),
    (lambda: nn.ZeroPad2d(3), None, Fraction(1)),
    (
        _batch_norm,
        (3, 4),
        max(
            Fraction(w) ** 2 / (Fraction(v) + Fraction(0.1))
            for w, v in zip([1.0, -3.0, 2.0], torch.tensor([0.7, 3.3, 1.9]).tolist(), strict=True)
        ),
    ),
]


@pytest.mark.parametrize(("make", "shape", "square"), EXACT, ids=lambda value: str(value)[:24])
def test_known_norms_are_enclosed_without_tolerance(make, shape, square: Fraction) -> None:
    found = norm(make(), input_shape=shape)
    assert Fraction(found.lower) ** 2 <= square <= Fraction(found.upper) ** 2
    assert found.gap < 1e-12


EVERY_SIZE = [
    (nn.Conv1d(2, 3, 3, padding=4), [(2, n) for n in (1, 2, 5, 12)]),
    (nn.Conv1d(1, 2, 4, padding="same", padding_mode="circular"), [(1, n) for n in (2, 3, 5, 12)]),
    (nn.Conv2d(2, 2, 3, padding=1, stride=2, padding_mode="circular"), [(2, 3, 4), (2, 4, 4), (2, 5, 1)]),
    (nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1), [(2, 1, 2), (2, 3, 4)]),
    (nn.AvgPool1d(3, stride=1, padding=1), [(2, n) for n in (1, 2, 5, 40)]),
    (nn.AvgPool2d((2, 3), stride=(1, 2)), [(1, 2, 3), (1, 4, 5)]),
    (nn.BatchNorm2d(2).eval(), [(2, 3, 1)]),
    (nn.Upsample(scale_factor=(4,)), [(2, n) for n in (1, 2, 5)]),
    (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3).eval()), [(2, 2, 2), (2, 4, 5)]),
    (nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)), [(3,)]),
]


@pytest.mark.parametrize(("layer", "shapes"), EVERY_SIZE, ids=lambda value: str(value)[:24])
def test_every_size_is_below_the_bound_for_every_size(layer: nn.Module, shapes) -> None:
    bound = norm(layer)
    assert bound.guarantee == "proved"
    for shape in shapes:
        assert_encloses(0.0, bound.upper, module_matrix(layer, shape))


def test_compositions_survive_small_and_large_weights() -> None:
    """Products of the parts' entries under- or overflow where the norm is asked for, and must stay enclosed."""
    for size in (1e-200, 1.0000001e-160, 1e-120, 1e120):
        weight = size * torch.eye(2, dtype=torch.float64)
        truth = Fraction(weight[0, 0].item()) ** 2 / 7
        parts = (Dense(weight), Dense(weight))
        for operator in (
            Scaled(Composed(parts), Fraction(1, 7)),
            Composed((*parts, Scaled(Dense(torch.eye(2)), Fraction(1, 7)))),
            Composed((Composed(parts), Diagonal(torch.full((2,), 4.0)), Scaled(Dense(torch.eye(2)), Fraction(1, 28)))),
        ):
            found = norm(operator)
            assert Fraction(found.lower) <= truth <= Fraction(found.upper)
            assert found.met or size < 1e-150  # subnormal ends are coarse


def test_compositions_of_cancelling_parts_are_enclosed() -> None:
    """The parts are of the order of one and their product is far below what float64 resolves beside one."""
    tiny = 2.0**-600
    first = torch.tensor([[tiny, 0.0], [0.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[tiny, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = norm(Composed((Dense(first), Dense(second))))  # the product: [[tiny**2, 0], [tiny, 0]]
    square = Fraction(tiny) ** 4 + Fraction(tiny) ** 2
    assert Fraction(found.lower) ** 2 <= square <= Fraction(found.upper) ** 2
    last = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = norm(Composed((Dense(first), Dense(second), Dense(last))))  # tiny**2 underflows
    assert Fraction(found.lower) <= Fraction(tiny) ** 2 <= Fraction(found.upper)
