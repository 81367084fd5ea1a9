"""Operators whose entries are not stored: how near they are to the exact ones, and what the constructors refuse."""

from fractions import Fraction
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import matrix_of
from opnorm.errors import ArgumentError, InputShapeError
from opnorm.operators import Composed, Dense, Diagonal, Isometry, LinearOperator, Permutation, Scaled, Separable
from opnorm.operators.base import magnitude

THIRDS = [{0: Fraction(1, 3), 1: Fraction(2, 3)}, {1: Fraction(1, 7), 2: Fraction(-5, 7)}]
HALVES = [{0: Fraction(1, 2)}, {1: Fraction(-2)}, {}]


def exact_kronecker(channels: int, axes: list[tuple[list[dict[int, Fraction]], int]]) -> list[list[Fraction]]:
    rows = []
    for c, *places in product(range(channels), *(range(len(matrix)) for matrix, _ in axes)):
        row = []
        for other, *columns in product(range(channels), *(range(n) for _, n in axes)):
            entries = [axes[i][0][p].get(q, Fraction(0)) for i, (p, q) in enumerate(zip(places, columns, strict=True))]
            row.append(prod(entries, start=Fraction(1)) if c == other else Fraction(0))
        rows.append(row)
    return rows


def assert_near(operator: LinearOperator, exact: list[list[Fraction]]) -> None:
    found = matrix_of(operator.apply, operator.in_shape, torch.float64).tolist()
    majorant = matrix_of(operator.absolute().apply, operator.in_shape, torch.float64).tolist()
    for row, bounds, wanted in zip(found, majorant, exact, strict=True):
        for entry, bound, truth in zip(row, bounds, wanted, strict=True):
            assert abs(Fraction(entry) - truth) <= Fraction(operator.entry_error) * Fraction(bound)


@pytest.mark.parametrize("axes", [[(THIRDS, 3)], [(THIRDS, 3), (HALVES, 2)], [(THIRDS, 3)] * 3], ids=["1", "2", "3"])
def test_entries_of_separable_maps(axes) -> None:
    operator = Separable.from_rows(2, axes)
    assert operator.factor_error == 2.0**-53
    assert 0 < operator.entry_error <= 1e-15
    assert_near(operator, exact_kronecker(2, axes))


def test_exact_entries_have_no_error() -> None:
    operator = Separable.from_rows(2, [(HALVES, 2), (HALVES, 2)])
    assert operator.factor_error == operator.entry_error == 0.0
    assert_near(operator, exact_kronecker(2, [(HALVES, 2), (HALVES, 2)]))


def test_products_of_exact_entries_may_be_rounded() -> None:
    fine = [{0: 1 + Fraction(1, 2**40)}]
    operator = Separable.from_rows(1, [(fine, 1), (fine, 1)])
    assert operator.factor_error == 0.0 < operator.entry_error
    assert_near(operator, exact_kronecker(1, [(fine, 1), (fine, 1)]))


@pytest.mark.parametrize("factor", [Fraction(1, 3), Fraction(-7, 5), Fraction(2)])
def test_entries_of_scaled_maps(factor: Fraction) -> None:
    weight = torch.rand(3, 4, dtype=torch.float64)
    assert_near(Scaled(Dense(weight), factor), [[factor * Fraction(w) for w in row] for row in weight.tolist()])


def test_entries_of_compositions() -> None:
    first, second = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    exact = [
        [sum(Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True)) for column in first.mT.tolist()]
        for row in second.tolist()
    ]
    assert_near(Composed((Dense(first), Dense(second))), exact)


def test_long_sums_of_compositions_are_accounted_for() -> None:
    """Small terms beside a large one are lost one by one."""
    row = torch.full((1, 4000), 2.0**-53, dtype=torch.float64)
    row[0, 0] = 1.0
    operator = Composed((Dense(torch.ones(4000, 1, dtype=torch.float64)), Dense(row)))
    assert_near(operator, [[sum(map(Fraction, row[0].tolist()))]])


@st.composite
def splits_and_orders(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    split = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return split, draw(st.permutations(range(len(split))))


@given(splits_and_orders())
def test_permutations_are_permutations(drawn: tuple[list[int], list[int]]) -> None:
    split, order = drawn
    operator = Permutation((prod(split),), tuple(split), tuple(order), tuple(split[axis] for axis in order))
    matrix = matrix_of(operator.apply, operator.in_shape, torch.float64)
    back = matrix_of(operator.adjoint, operator.out_shape, torch.float64)
    assert torch.equal(matrix @ matrix.mT, torch.eye(prod(split), dtype=torch.float64))
    assert set(matrix.flatten().tolist()) <= {0.0, 1.0}
    assert torch.equal(back, matrix.mT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), (2, 3), (0, 1), (6,)), "differ in their numbers"),
        (((6,), (2, 3), (0, 1), (5,)), "differ in their numbers"),
        (((6,), (2, 3), (0, 0), (6,)), "no permutation"),
        (((6,), (2, 3), (0,), (6,)), "no permutation"),
        (((6,), (-2, -3), (0, 1), (6,)), "negative"),
    ],
)
def test_what_is_no_permutation_is_refused(arguments, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Permutation(*arguments)


def test_compositions_must_fit() -> None:
    with pytest.raises(ArgumentError, match=r"Dense takes \(3,\), but the Dense before it gives \(2,\)"):
        Composed((Dense(torch.ones(2, 3)), Dense(torch.ones(2, 3))))
    with pytest.raises(ArgumentError, match="at least one part"):
        Composed(())
    assert Composed((Isometry(1), Dense(torch.ones(2, 3)))).out_shape == (2,)


@pytest.mark.parametrize("operator", [Isometry(2), Diagonal(torch.ones(2), None)], ids=["Isometry", "Diagonal"])
def test_operators_for_every_size_have_no_shape(operator: LinearOperator) -> None:
    for use in (lambda: operator.in_shape, lambda: operator.out_shape, lambda: operator.apply(torch.ones(1, 2))):
        with pytest.raises(InputShapeError, match="give input_shape"):
            use()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_magnitudes_are_rounded_upward(dtype: torch.dtype) -> None:
    weight = torch.randn(500, dtype=dtype)
    for w, m in zip(weight.tolist(), magnitude(weight).tolist(), strict=True):
        squared = Fraction(w.real) ** 2 + Fraction(w.imag) ** 2
        assert squared <= Fraction(m) ** 2 <= squared * (1 + Fraction(1, 2**40))
    assert magnitude(torch.zeros(1, dtype=dtype)).item() == 0.0


def test_composition_dtypes_are_promoted() -> None:
    parts = (Dense(torch.ones(2, 2, dtype=torch.float16)), Dense(torch.ones(2, 2, dtype=torch.complex64)))
    assert Composed(parts).dtype == torch.complex64
