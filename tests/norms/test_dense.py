"""Spectral norms of matrices: small ones decided in integers, larger ones against SciPy, both without mercy."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opnorm
from cases import ORACLE, WEIGHTS, largest_singular_value
from exact_norm import norm_at_most
from opnorm.errors import ArgumentError, ArithmeticModeError, TooLargeError, WeightError
from opnorm.norms.dense import dense_norm

REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*REAL, torch.complex64, torch.complex128]


def gaussian(rows, columns, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_exact(found, matrix):
    """Both ends, decided in integers."""
    assert found.upper == math.inf or norm_at_most(matrix, found.upper), "the upper end is below the norm"
    assert found.lower == 0 or not norm_at_most(matrix, math.nextafter(found.lower, 0.0)), "the lower end is above"


ADVERSARIAL = {
    "gaussian": gaussian(5, 5),
    "orthogonal": torch.linalg.qr(gaussian(5, 5, 1))[0],
    "rank one": gaussian(5, 1, 2) @ gaussian(1, 4, 3),
    "near tie": torch.diag(torch.tensor([1.0, 1 - 1e-7, -1, 1e-9], dtype=torch.float64)),
    "tie": torch.eye(4, dtype=torch.float64),
    "hilbert": 1 / (1.0 + torch.arange(5)[:, None] + torch.arange(5)).double(),
    "one row": gaussian(1, 7, 4),
    "one column": gaussian(7, 1, 5),
    "one entry": torch.tensor([[0.3]], dtype=torch.float64),
    "constant": torch.full((4, 6), 0.1, dtype=torch.float64),
    "delta": torch.diag(torch.tensor([0.0, 0, -7, 0], dtype=torch.float64)).roll(1, 0),
    "hadamard": torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64),
    "graded": torch.diag(10.0 ** -torch.arange(0.0, 300, 60, dtype=torch.float64)) + 1e-301,
    "nilpotent": torch.triu(torch.ones(5, 5, dtype=torch.float64), 1),
    "huge": gaussian(4, 4, 6) * 1e307,
    "tiny": gaussian(4, 4, 7) * 1e-307,
    "subnormal": gaussian(4, 4, 8) * 1e-320,
    "smallest": torch.full((3, 3), 5e-324, dtype=torch.float64),
    "ends of the range": torch.tensor([[1.7e308, 5e-324], [-5e-324, 1e-300]], dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name):
    matrix = ADVERSARIAL[name]
    for weight in (matrix, matrix.mT):
        found = opnorm.norm(weight)
        assert_exact(found, weight)
        assert found.guarantee == "proved" and (found.met or found.upper < 1e-300)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "near-tie", "sparse", "tiny", "huge", "integers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_taken_as_they_are_stored(dtype, kind):
    torch.manual_seed(3)
    empty = torch.empty(4, 5)
    weight = torch.randint(-3, 4, (4, 5)).double() if kind == "integers" else WEIGHTS[kind](empty).double()
    limits = torch.finfo(dtype)
    if kind in {"tiny", "huge"}:
        weight = weight / weight.abs().max() * (limits.smallest_normal / 16 if kind == "tiny" else limits.max * 0.9)
    weight = torch.complex(weight, weight.flip(0) / 3).to(dtype) if dtype.is_complex else weight.to(dtype)
    assert_exact(opnorm.norm(weight), weight)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(DTYPES), st.integers(-30, 30))
def test_random_matrices(rows, columns, seed, dtype, exponent):
    weight = (gaussian(rows, columns, seed, torch.complex128 if dtype.is_complex else torch.float64)).to(dtype)
    weight = weight * 2.0 ** (exponent if dtype not in {torch.float16} else exponent / 10)
    assert_exact(opnorm.norm(weight, rtol=10.0 ** (exponent // 3 - 4)), weight)


SIZES = [(300, 200), (200, 300), (193, 193), (1030, 1030), (40, 5000), (193, 1500)]


@pytest.mark.parametrize(
    "shape, dtype", [*((shape, torch.float32) for shape in SIZES), *((shape, torch.complex64) for shape in SIZES[:3])]
)
def test_larger_matrices_meet_the_target(shape, dtype):
    weight = gaussian(*shape, 1, dtype)
    found = opnorm.norm(weight)
    truth = largest_singular_value(weight.to(torch.complex128 if dtype.is_complex else torch.float64))
    assert found.lower <= truth * (1 + ORACLE) and truth * (1 - ORACLE) <= found.upper
    assert found.met and found.gap <= 1e-6 and found.guarantee == "proved"


@pytest.mark.parametrize("kind", ["orthogonal", "rank-one", "near-tie", "hilbert", "constant", "low-rank", "trained"])
def test_hard_spectra_meet_the_target(kind):
    torch.manual_seed(5)
    if kind == "low-rank":
        weight = gaussian(400, 10) @ gaussian(10, 300) + 1e-4 * gaussian(400, 300, 1)
    elif kind == "trained":  # a decaying spectrum, as training leaves it
        weight = gaussian(400, 300) @ torch.diag(torch.arange(1.0, 301).double() ** -0.7)
    else:
        weight = WEIGHTS[kind](torch.empty(400, 300)).double()
    found = opnorm.norm(weight.float())
    truth = largest_singular_value(weight.float().double())
    assert found.lower <= truth * (1 + ORACLE) and truth * (1 - ORACLE) <= found.upper
    assert found.gap <= 1e-6


def test_sums_that_lose_small_terms():
    """A row of 2**20 entries: the squares of 2**-27 vanish beside 1, and so would a bound without its error term."""
    row = torch.full((1, 2**20), 2.0**-27, dtype=torch.float32)
    row[0, 0] = 1.0
    exact_square = 1 + (2**20 - 1) * Fraction(1, 2**54)
    for weight in (row, row.mT):
        found = opnorm.norm(weight)
        assert Fraction(found.lower) ** 2 <= exact_square <= Fraction(found.upper) ** 2


def test_zero_and_empty():
    for weight in (torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(0, 0)):
        for guarantee in ("proved", "probable", "estimate"):
            found = opnorm.norm(weight, guarantee=guarantee)
            assert (found.lower, found.upper, found.gap) == (0.0, 0.0, 0.0) and found.met


def test_exact_where_the_entries_say_all():
    for weight, truth in [(torch.ones(3, 12), 6.0), (torch.eye(5), 1.0), (torch.tensor([[3.0], [4.0]]), 5.0)]:
        found = opnorm.norm(weight)
        assert found.gap < 1e-13 and truth in found


def test_views_gradients_and_lazy_conjugates():
    base = gaussian(6, 6, 1, torch.complex128)
    for weight in (base.mH, base.conj(), base[::2, ::3], base.real, base.imag, base.mH.imag):
        assert_exact(opnorm.norm(weight), weight.resolve_conj().resolve_neg().contiguous())
    assert opnorm.norm(gaussian(3, 3).requires_grad_()).met


def test_slack_widens_both_ends():
    matrix = gaussian(4, 4)
    plain, wide = dense_norm(matrix, rtol=1e-6), dense_norm(matrix, rtol=1e-6, slack=0.5)
    assert wide.lower <= plain.lower - 0.5 and wide.upper >= plain.upper + 0.5
    assert dense_norm(torch.zeros(2, 2), rtol=1e-6, slack=0.5).upper == 0.5
    assert dense_norm(matrix, rtol=1e-6, slack=100.0).lower == 0.0


BAD = {
    "NaN": (torch.tensor([[1.0, math.nan]]), WeightError, "NaN"),
    "infinite": (torch.tensor([[1.0, -math.inf]]), WeightError, "infinite"),
    "complex NaN": (torch.tensor([[complex(0, math.nan)]]), WeightError, "NaN"),
    "integers": (torch.ones(2, 2, dtype=torch.int64), WeightError, "int64"),
    "bool": (torch.ones(2, 2, dtype=torch.bool), WeightError, "bool"),
    "vector": (torch.ones(3), ArgumentError, "matrix"),
    "stack": (torch.eye(2).reshape(2, 2, 1), ArgumentError, "slice"),
    "kernel": (torch.ones(2, 2, 3, 3), ArgumentError, "Conv"),
    "no tensor": ([[1.0]], ArgumentError, "list"),
    "sparse": (torch.eye(2).to_sparse(), WeightError, "to_dense"),
    "meta": (torch.empty(2, 2, device="meta"), WeightError, "meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_matrix_is_refused(name):
    weight, error, words = BAD[name]
    with pytest.raises(error, match=words):
        opnorm.norm(weight)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "magic"}, "'torus'"),
        ({"method": "lanczos"}, "probable"),
        ({"method": "torus"}, "convolutions"),
        ({"method": "structured"}, "Dense"),
        ({"guarantee": "sure"}, "'proved'"),
        ({"guarantee": "sure", "ord": 1}, "'proved'"),
        ({"ord": 0.5}, "ord"),
        ({"ord": math.nan}, "ord"),
        ({"ord": 1, "method": "dense"}, "ord=2"),
        ({"rtol": 0.0}, "rtol"),
        ({"rtol": math.nan}, "rtol"),
        ({"failure_probability": 1.0}, "failure_probability"),
    ],
)
def test_arguments_without_a_meaning_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        opnorm.norm(torch.eye(2), **options)


def test_what_does_not_fit_names_the_way_out():
    with pytest.raises(TooLargeError, match="probable"):
        opnorm.norm(torch.zeros(1).expand(10**6, 10**6))
    with pytest.raises(TooLargeError, match="probable"):
        dense_norm(torch.zeros(1).expand(10**6, 10**6), rtol=1e-6)


@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize("guarantee", ["proved", "probable"])
def test_flush_to_zero_is_refused_for_every_order(ord, guarantee):
    """Subnormal weights would be read as zeros, and their norm as 0."""
    torch.set_flush_denormal(True)
    try:
        with pytest.raises(ArithmeticModeError):
            opnorm.norm(torch.full((2, 2), 5e-324, dtype=torch.float64), ord=ord, guarantee=guarantee)
    finally:
        torch.set_flush_denormal(False)


def test_targets_may_be_absurd():
    matrix = gaussian(5, 5)
    for rtol in (1e-300, 1e-15, 1e3, 1e300):
        assert_exact(opnorm.norm(matrix, rtol=rtol), matrix)
        large = gaussian(200, 200)
        found = opnorm.norm(large, rtol=rtol)
        truth = largest_singular_value(large)
        assert found.lower <= truth * (1 + ORACLE) and truth * (1 - ORACLE) <= found.upper
