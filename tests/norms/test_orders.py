"""Norms between other spaces than l2: sums in rational arithmetic, and vectors that no upper end may lie below."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch import nn

import opnorm
from opnorm.errors import ArgumentError, TooLargeError

INF = math.inf


def exact_power(matrix, order):
    """The norm, or its square, as a rational number, with the exponent that was taken."""
    rows = [[abs(Fraction(x)) for x in row] for row in matrix.to(torch.float64).tolist()]
    columns = list(zip(*rows, strict=True))
    sums = {
        (1, 1): (max(map(sum, columns)), 1),
        (INF, INF): (max(map(sum, rows)), 1),
        (1, 2): (max(sum(x * x for x in column) for column in columns), 2),
        (2, INF): (max(sum(x * x for x in row) for row in rows), 2),
        (1, INF): (max(map(max, rows)), 1),
    }
    return sums[order]


@settings(deadline=None, derandomize=True, max_examples=120)
@given(
    st.sampled_from([(1, 1), (INF, INF), (1, 2), (2, INF), (1, INF)]),
    st.lists(st.lists(st.floats(-1e300, 1e300), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_norms_read_off_the_entries(order, rows):
    matrix = torch.tensor(rows, dtype=torch.float64)
    found, (exact, power) = opnorm.norm(matrix, ord=order), exact_power(matrix, order)
    assert Fraction(found.lower) ** power <= exact <= Fraction(found.upper) ** power
    assert found.gap < 1e-12 or found.upper < 1e-300


def attained(matrix, order, starts=200):
    """The largest gain of many vectors, with 30 digits."""
    p, q = order
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.eye(matrix.shape[1]), torch.randn(starts, matrix.shape[1], generator=generator).sign(),
                   torch.randn(starts, matrix.shape[1], generator=generator)]).double()  # fmt: skip
    x = x[x.abs().amax(1) > 0]
    image = x @ matrix.mT
    gains = torch.linalg.vector_norm(image, q, dim=1) / torch.linalg.vector_norm(x, p, dim=1)
    return float(gains.max())


@pytest.mark.parametrize(
    "order", [(1, 1.5), (1, 3), (1.5, 1.5), (1.2, 4), (3, 3), (2, 5), (3, INF), (1.7, INF), (40, 40)]
)
@pytest.mark.parametrize("kind", ["gaussian", "hadamard", "positive", "rank one"])
def test_interpolated_orders(order, kind):
    generator = torch.Generator().manual_seed(3)
    matrix = {
        "gaussian": torch.randn(4, 3, generator=generator).double(),
        "hadamard": torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
        "positive": torch.rand(4, 3, generator=generator).double(),
        "rank one": torch.randn(4, 1, generator=generator).double() @ torch.randn(1, 3, generator=generator).double(),
    }[kind]
    found = opnorm.norm(matrix, ord=order)
    best = attained(matrix, order)
    assert found.upper >= best * (1 - 1e-12) and found.lower > 0.2 * best
    p, q = order
    dual = 1.0 if p == INF else p / (p - 1) if p > 1 else INF
    if p == 1:  # the largest column
        truth = float(torch.linalg.vector_norm(matrix, q, dim=0).max())
    elif q == INF:  # the largest row in the dual norm
        truth = float(torch.linalg.vector_norm(matrix, dual, dim=1).max())
    elif kind == "rank one":  # |u|_q |v|_p'
        truth = float(torch.linalg.vector_norm(matrix[:, 0], q) * torch.linalg.vector_norm(matrix[0], dual))
        truth = truth / abs(float(matrix[0, 0]))
    else:
        return
    assert found.lower <= truth * (1 + 1e-12) and truth * (1 - 1e-12) <= found.upper


@pytest.mark.parametrize("order", [40.0, 300.0, 1050.0, 5000.0])
def test_high_powers_do_not_underflow(order):
    """0.5**1050 is subnormal and has lost half its digits; the norm of a diagonal is its largest entry."""
    found = opnorm.norm(torch.diag(torch.tensor([0.5000001, 0.5, 1e-9], dtype=torch.float64)), ord=order)
    assert found.lower <= 0.5000001 <= found.upper and found.gap < 1e-5


def test_the_lower_end_of_a_column_is_below_it_to_the_last_digit():
    mp.dps = 50
    for seed in range(20):
        column = torch.randn(7, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for q in (1.5, 3.0, 7.0):
            exact = sum(abs(mpf(x)) ** mpf(q) for x in column.flatten().tolist()) ** (1 / mpf(q))
            found = opnorm.norm(column, ord=(1.3, q))
            assert mpf(found.lower) <= exact <= mpf(found.upper)


def test_orders_that_interpolation_does_not_cover():
    """[[1, 1], [1, -1]] from l4 to l(4/3) attains 1.7268, above what Riesz-Thorin would say (1.6818)."""
    matrix = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert attained(matrix.double(), (4, 4 / 3), 2000) > 1.6818 * 1.02
    for order in [(4, 4 / 3), (2, 1), (INF, 1), (INF, 2)]:
        with pytest.raises(ArgumentError, match="p_in <= p_out"):
            opnorm.norm(matrix, ord=order)


def test_layers_and_complex_matrices():
    layer = nn.Conv1d(2, 3, 3, padding=1, bias=False)
    assert opnorm.norm(layer, input_shape=(2, 8), ord=INF).upper == pytest.approx(
        float(layer.weight.detach().abs().sum((1, 2)).max()), rel=1e-6
    )
    wrapped = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")
    assert opnorm.norm(wrapped, input_shape=(2, 8), ord=1).upper == pytest.approx(
        float(wrapped.weight.detach().abs().sum((0, 2)).max()), rel=1e-6
    )
    weight = torch.tensor([[3.0 + 4.0j, 1.0], [0.0, 2.0j]])
    assert 6.0 in opnorm.norm(weight, ord=INF) and 5.0 in opnorm.norm(weight, ord=1)
    assert 5.0 in opnorm.norm(weight, ord=(1, INF))


def test_entries_that_are_rounded_are_enclosed():
    """Means of three, which no float is, and taps that fall on one sample and cancel."""
    third = opnorm.norm(nn.AvgPool1d(3), input_shape=(1, 3), ord=INF)
    assert third.lower < 1 < third.upper and third.upper < 1 + 1e-12
    third = opnorm.norm(nn.AvgPool1d(3), input_shape=(1, 3), ord=1)
    assert Fraction(third.lower) < Fraction(1, 3) < Fraction(third.upper) and third.gap < 1e-12
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0.0, 2.0**-60]]]))
    exact = 1 + Fraction(1, 2**60)
    found = opnorm.norm(layer, input_shape=(1, 2), ord=INF)
    assert Fraction(found.lower) <= exact <= Fraction(found.upper) and found.gap < 1e-12
    with pytest.raises(ArgumentError, match="compositions"):
        opnorm.norm(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), input_shape=(2,), ord=1)


@pytest.mark.parametrize("order", [1, INF, (1, 2), (3, 4)])
def test_zero_and_empty(order):
    for matrix in (torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(3, 0)):
        assert opnorm.norm(matrix, ord=order).upper == 0.0


@pytest.mark.parametrize("order", [1, (2, math.inf), 1.5])
def test_what_does_not_fit_gets_advice_that_helps(order):
    layer = nn.Conv2d(1, 1, 3, padding=1)
    with pytest.raises(TooLargeError, match="smaller input_shape") as caught:
        opnorm.norm(layer, input_shape=(1, 1000, 1000), ord=order)
    assert "probable" not in str(caught.value)
    assert opnorm.norm(layer, input_shape=(1, 4, 4), ord=order).upper < 10
    assert opnorm.norm(layer, ord=1).upper < 10
