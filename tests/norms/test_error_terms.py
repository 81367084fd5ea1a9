"""The a-priori error terms, each against what rounding really did; whole enclosures would hide a missing one."""

import math
from fractions import Fraction

import pytest
import torch
from mpmath import mp, mpc, mpf

import opnorm
from exact_norm import enclose_exactly, norm_at_most
from opnorm.norms.attained import attained
from opnorm.norms.dense import _factored
from opnorm.norms.gram import Gram, attained_square, cheap_bound, gram_of_columns
from opnorm.norms.materialised import matrix_of
from opnorm.norms.stacks import ceilings as ceilings_of
from opnorm.norms.symbol import Grid
from opnorm.norms.tall import attained_by_rows, cheap_bound_of_rows, tall
from opnorm.operators import Conv, Dense


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gram_matrices_are_as_close_as_they_say(dtype):
    """Entry by entry in rational numbers; the largest deviation is at most the spectral norm of the error."""
    matrix = gaussian(60, 3, dtype=dtype) / 8
    found = gram_of_columns(tall(matrix))
    worst = Fraction(0)
    for i in range(3):
        for j in range(i + 1):
            pairs = list(zip(matrix[:, i].tolist(), matrix[:, j].tolist(), strict=True))
            real = sum(Fraction(a.real) * Fraction(b.real) + Fraction(a.imag) * Fraction(b.imag) for a, b in pairs)
            imag = sum(Fraction(a.real) * Fraction(b.imag) - Fraction(a.imag) * Fraction(b.real) for a, b in pairs)
            entry = complex(found.matrix[i, j])
            off = (Fraction(entry.real) - real) ** 2 + ((Fraction(entry.imag) - imag) ** 2 if i != j else 0)
            worst = max(worst, off)
    assert 0 < worst <= Fraction(found.error) ** 2
    assert found.error < 1e-12


@pytest.mark.parametrize("columns", [1, 2])
def test_a_gram_that_loses_every_small_term_is_covered(columns):
    """Squares of 2**-27 vanish beside ones that sit in every lane of the summation."""
    matrix = torch.full((2**18, columns), 2.0**-27, dtype=torch.float32)
    matrix[:256, 0] = 1.0
    matrix[:, 1:] = 0.0
    exact_square = 256 + (2**18 - 256) * Fraction(1, 2**54)
    found = opnorm.norm(matrix)
    assert Fraction(found.lower) ** 2 <= exact_square <= Fraction(found.upper) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_symbols_are_as_close_as_they_say(dtype):
    mp.dps = 40
    kernel = gaussian(1, 2, 2, 6, seed=3, dtype=dtype) / 4
    offsets = torch.tensor([(i, 2 * j) for i in range(2) for j in range(3)])
    grid = Grid(kernel, offsets, (7, 12), (1, 2))
    worst = mpf(0)
    real, imag = grid.blocks(grid.frequencies)
    for b, frequency in enumerate(grid.frequencies.tolist()):
        for m in range(2):
            f = (frequency[0], frequency[1] + 6 * m)
            for o in range(2):
                for c in range(2):
                    exact = mpc(0)
                    for t, (x, y) in enumerate(offsets.tolist()):
                        angle = 2 * mp.pi * (mpf(f[0] * x) / 7 + mpf(f[1] * y) / 12)
                        exact += mp.mpmathify(complex(kernel[0, o, c, t])) * mp.expj(angle)
                    column = 2 * m + c
                    found = mpc(float(real[b, o, column]), float(imag[b, o, column]))
                    worst = max(worst, abs(found - exact))
    assert 0 < worst / mp.sqrt(2) <= grid.error < 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e-150, 1e-158, 1e-160, 1e-161, 1e-162, 1e-300])
def test_attained_gains_are_attained_whatever_underflows(scale):
    for seed in range(12):
        matrix = gaussian(3, 2, seed=seed) * scale
        vector = torch.linalg.svd(matrix / scale)[2][0]
        found = attained(Dense(matrix), vector)
        assert found == 0.0 or not norm_at_most(matrix, math.nextafter(found, 0.0))
        assert scale < 1e-100 or found > 0.0
    assert attained(Dense(matrix), vector * math.nan) == 0.0


def test_ceilings_hold_for_every_matrix_within_the_error():
    """`lambda_max(G + E) <= ceiling` for all `|E| <= error`, and so for the one that adds the error to each value."""
    gram = gaussian(4, 3, seed=5)
    gram = gram.mT @ gram
    error, t = 0.25, 1.5 * float(torch.linalg.eigvalsh(gram)[-1])
    found = _factored(Gram(gram, error, 1.0), t)
    assert found.ceiling >= t + error and found.ceiling < t + error + 1e-12
    low = torch.full((1, 1), 0.5, dtype=torch.float64)
    stack = torch.stack([low, 0 * low, 4 * low])
    ceilings = ceilings_of(stack, torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64), 1.0)
    assert ceilings[0] >= 1.25 and ceilings[1] >= 1.5 and ceilings[1] < 1.5 + 1e-12 and ceilings[2] == math.inf
    # Of t = 1 and G = 0 remains the factorisation's own loss, gamma_n times n.
    found = ceilings_of(torch.zeros(1, 20, 20, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 1.0)
    assert float(found) >= 1 + 400 * 2.0**-53


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (9, 2), (2, 9), (700, 4)], ids=str)
def test_gains_read_off_rows_and_off_the_gram_matrix_are_attained(dtype, shape):
    matrix = gaussian(*shape, seed=7, dtype=dtype) / 8
    rows = tall(matrix)
    gram = gram_of_columns(rows)
    vector = torch.linalg.eigh(gram.matrix).eigenvectors[:, -1]
    exact = enclose_exactly(matrix)
    for found in (attained_by_rows(rows, vector), math.sqrt(attained_square(gram, vector))):
        assert exact.upper * (1 - 1e-11) <= found <= exact.upper
    # A vector of another length has the same gain; no rounding of its length may help it.
    assert math.sqrt(attained_square(gram, vector * (1 - 2.0**-30))) <= exact.upper


def test_an_attained_square_gives_back_what_the_gram_matrix_may_be_wrong_by():
    gram = Gram(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), 0.5, 4.0)
    found = attained_square(gram, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert 3.5 - 1e-12 <= found <= 3.5 - 4 * 2.0**-53


def test_cheap_bounds_are_bounds():
    for seed in range(30):
        matrix = gaussian(4, 5, seed=seed) * 10.0 ** (-10 * seed)
        assert norm_at_most(matrix, cheap_bound(matrix))
        rows = tall(matrix)
        assert norm_at_most(matrix, math.ldexp(cheap_bound_of_rows(rows), rows.exponent))


def test_a_group_with_the_larger_frobenius_norm_is_not_the_last():
    """The identity has the larger Frobenius norm and the smaller norm: stopping at it would miss the other group."""
    weight = torch.cat([torch.eye(2), 0.6 * torch.ones(2, 2)])[..., None]
    for mode in ("zeros", "circular"):
        for method in ("auto", "dense", "banded", "torus"):
            if (mode, method) != ("circular", "banded"):
                conv = Conv(weight, (4,), (1,), ((0, 0),), (1,), 2, mode)
                found = opnorm.norm(conv, method=method)
                assert found.lower <= 1.2000001 and found.upper >= 1.1999999
                assert found.gap < 1e-6


def test_sums_of_taps_have_their_own_error():
    """Two taps that read the same sample are added in float64: the sum is rounded, and its error is in the slack."""
    weight = torch.tensor([[[1.0, 1e-17, 0.0]]], dtype=torch.float64)
    conv = Conv(weight, (1,), (1,), ((1, 1),), (1,), 1, "replicate")
    exact = Fraction(1.0) + Fraction(1e-17)
    assert Fraction(float(matrix_of(conv))) != exact
    for method in ("dense", "torus", "banded"):
        found = opnorm.norm(conv, method=method)
        assert Fraction(found.lower) <= exact <= Fraction(found.upper)
