"""The Cholesky lemma: what it says of the smallest eigenvalue is decided exactly, in rational numbers."""

import math
from fractions import Fraction
from itertools import pairwise

import flint
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_norm import real_form
from opnorm.certificate import posdef
from opnorm.errors import ArithmeticModeError


def is_semidefinite(matrix, shift):
    """Decide whether `matrix - shift I` is positive semi-definite, exactly; only the lower triangle counts."""
    rows = [[Fraction(x) for x in row] for row in real_form(matrix).tolist()]
    rows = [[rows[max(i, j)][min(i, j)] - (Fraction(shift) if i == j else 0) for j in range(len(rows))]
            for i in range(len(rows))]  # fmt: skip
    exact = flint.fmpq_mat([[flint.fmpq(x.numerator, x.denominator) for x in row] for row in rows])
    coefficients = exact.charpoly().coeffs()
    return all((-1) ** (len(rows) - k) * c >= 0 for k, c in enumerate(coefficients))


def gram(n, seed, dtype=torch.float64, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, rank or n, generator=generator, dtype=dtype)
    product = root @ root.mH
    return torch.tril(product) + torch.tril(product, -1).mH  # exactly Hermitian but for the diagonal's zeros


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 1000), st.sampled_from([torch.float64, torch.complex128]), st.floats(-14, 1))
def test_the_floor_is_below_the_smallest_eigenvalue(n, seed, dtype, power):
    matrix = gram(n, seed, dtype, rank=max(1, n // 2))
    matrix = torch.complex(matrix.real, matrix.imag - matrix.imag.diagonal().diag()) if matrix.is_complex() else matrix
    matrix = matrix + 10.0**power * torch.eye(n, dtype=dtype)
    floor = float(posdef.eigenvalue_floor(matrix))
    assert floor == -math.inf or (floor <= 0 and is_semidefinite(matrix, floor))
    assert power < -12 or floor > -1e-11


def test_a_completed_factorisation_of_an_indefinite_matrix_is_caught():
    """Rounding lets Cholesky complete below zero; the floor knows."""
    caught = 0
    for seed in range(300):
        matrix = gram(5, seed, rank=3) + 1e-16 * torch.eye(5, dtype=torch.float64)
        floor = float(posdef.eigenvalue_floor(matrix))
        if floor > -math.inf and not is_semidefinite(matrix, 0.0):
            caught += 1
            assert is_semidefinite(matrix, floor)
    assert caught > 0


def test_entries_of_a_batch_fail_alone():
    good = gram(3, 1) + torch.eye(3, dtype=torch.float64)
    broken = good.clone()
    broken[2, 2] = -1.0
    nan = torch.full((3, 3), math.nan, dtype=torch.float64)
    infinite = good.clone()
    infinite[0, 0] = math.inf
    hidden = good.clone()
    hidden[1, 0] = math.nan
    floors = posdef.eigenvalue_floor(torch.stack([good, broken, nan, infinite, hidden, good]))
    assert torch.isfinite(floors).tolist() == [True, False, False, False, False, True]
    assert (floors[~torch.isfinite(floors)] == -math.inf).all()
    assert floors[0] == floors[-1] == posdef.eigenvalue_floor(good)


def test_only_the_lower_triangle_is_read():
    matrix = gram(4, 2) + torch.eye(4, dtype=torch.float64)
    assert posdef.eigenvalue_floor(torch.tril(matrix)) == posdef.eigenvalue_floor(matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("widths", [[4], [3, 3], [2, 3, 1, 2]])
def test_block_tridiagonal_agrees_with_the_whole(widths, dtype):
    size, starts = sum(widths), [sum(widths[:i]) for i in range(len(widths))]
    matrix = gram(size, 3, dtype)
    for i, (start, width) in enumerate(zip(starts, widths, strict=True)):
        end = start + width + (widths[i + 1] if i + 1 < len(widths) else 0)
        matrix[end:, start : start + width] = 0
        matrix[start : start + width, end:] = 0
    matrix = matrix + 30 * torch.eye(size, dtype=dtype)
    spans = [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]

    def factored(shifted):
        blocks = [shifted[s, s] for s in spans]
        below = [shifted[t, s] for s, t in pairwise(spans)]
        return posdef.factor_block_tridiagonal(iter(blocks), iter(below))

    found = factored(matrix)
    assert -1e-10 < found.floor <= 0
    whole = torch.linalg.cholesky(matrix)
    for span, block in zip(spans, found.diagonal, strict=True):
        torch.testing.assert_close(block, whole[span, span])
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    assert factored(matrix - (smallest + 1e-6) * torch.eye(size, dtype=dtype)) is None
    assert factored(matrix - (smallest - 1e-6) * torch.eye(size, dtype=dtype)) is not None


def test_block_floor_covers_what_rounding_completes():
    for seed in range(200):
        matrix = gram(4, seed, rank=2) + 1e-16 * torch.eye(4, dtype=torch.float64)
        found = posdef.factor_block_tridiagonal([matrix[:2, :2], matrix[2:, 2:]], [matrix[2:, :2]])
        assert found is None or is_semidefinite(matrix, found.floor)


def test_frobenius_is_bounded_from_above():
    for seed in range(50):
        matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        exact = sum(Fraction(x) ** 2 for x in matrix.flatten().tolist())
        assert exact <= Fraction(float(posdef.squared_frobenius_above(matrix))) <= exact * (1 + Fraction(1, 10**12))


def test_flush_to_zero_is_refused():
    posdef.require_ieee_arithmetic()
    assert torch.set_flush_denormal(True)
    try:
        with pytest.raises(ArithmeticModeError, match="set_flush_denormal"):
            posdef.require_ieee_arithmetic()
    finally:
        torch.set_flush_denormal(False)
