"""The stored, rounded weight obeys the bound, decided in integers: there is no tolerance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_norm import enclose_exactly, norm_at_most
from opnorm import Enclosure
from opnorm.errors import ArgumentError, ArithmeticModeError, WeightError
from opnorm.norms.casting import scale_to_bound

REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*REAL, torch.complex64, torch.complex128]


def gaussian(rows, columns, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=dtype, generator=generator)


def hilbert(n):
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index + 1)


ADVERSARIAL = {
    "truncation grows it": torch.tensor([[1.0, 1.0], [-1.0, 1.0]]),
    "truncation grows it, scaled": torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 3,
    "hilbert": hilbert(5),
    "orthogonal": torch.linalg.qr(gaussian(5, 5, 1))[0],
    "rank one": gaussian(6, 1, 2) @ gaussian(1, 4, 3),
    "one row": gaussian(1, 7, 4),
    "one column": gaussian(7, 1, 5),
    "one entry": torch.tensor([[0.3]]),
    "all equal": torch.full((6, 6), 0.1),
    "mostly tiny": torch.diag(torch.tensor([1.0, 1e-5, 1e-7, 1e-8])) + 1e-8,
    "near tie": torch.diag(torch.tensor([1.0, 1.0 - 1e-7, -1.0])),
}
BOUNDS = [1.0, 0.1, 1 / 3, 7.3]


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_no_rounding_lifts_the_norm_above_the_bound(case, dtype, measured):
    weight = ADVERSARIAL[case].to(dtype)
    enclosure = enclose_exactly(weight)
    for bound in BOUNDS:
        scaled = scale_to_bound(weight, enclosure, bound, measure=enclose_exactly if measured else None)
        assert scaled.dtype == dtype and scaled.shape == weight.shape
        assert norm_at_most(scaled, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measured", [False, True])
def test_little_is_given_away(dtype, measured):
    weight = gaussian(6, 6, 7).to(dtype)
    roundoff = torch.finfo(dtype).eps / 2
    scaled = scale_to_bound(weight, enclose_exactly(weight), 1.0, measure=enclose_exactly if measured else None)
    # The a-priori factor costs at most |W|_F / sigma <= sqrt(6) roundoffs, next to those of its own computation.
    assert not norm_at_most(scaled, 1 - (2 if measured else 8) * roundoff - 12 * 2.0**-53)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
    st.floats(0.01, 50),
    st.booleans(),
)
def test_property_the_bound_holds(rows, columns, seed, dtype, bound, measured):
    weight = gaussian(rows, columns, seed).to(dtype)
    measure = enclose_exactly if measured else None
    assert norm_at_most(scale_to_bound(weight, enclose_exactly(weight), bound, measure=measure), bound)


@pytest.mark.parametrize(
    ("dtype", "scale", "bound"),
    [
        (torch.float32, 1e-40, 1.0),
        (torch.float32, 1e38, 1.0),
        (torch.float32, 1.0, 1e-37),
        (torch.float32, 1e-44, 3e38),
        (torch.float64, 1e300, 1.0),
        (torch.float64, 1e-300, 1.0),
        (torch.float64, 1e-322, 1.0),
        (torch.float64, 1e-322, 1e300),
        (torch.float64, 1e300, 1e-300),
        (torch.float64, 1e300, 1e-310),
        (torch.complex128, 1e300, 1e-300),
        (torch.bfloat16, 1e-39, 1.0),
        (torch.float16, 6e-8, 1.0),
        (torch.float16, 1.0, 1e-6),
        (torch.float16, 1.0, 6e4),
    ],
)
@pytest.mark.parametrize("measured", [False, True])
def test_extreme_scales(dtype, scale, bound, measured):
    weight = (gaussian(3, 4, 11).clamp(-1.5, 1.5) * scale).to(dtype)
    enclosure = enclose_exactly(weight)
    scaled = scale_to_bound(weight, enclosure, bound, measure=enclose_exactly if measured else None)
    assert norm_at_most(scaled, bound)
    assert measured is False or not norm_at_most(scaled, bound / 2)


def test_a_kernel_keeps_within_the_norm_of_its_largest_frequency():
    kernel = gaussian(3, 2 * 9, 13).reshape(3, 2, 3, 3).to(torch.bfloat16)
    # At frequency zero the symbol is the sum of the taps; make all entries positive so that this is the supremum.
    kernel = kernel.abs()
    enclosure = enclose_exactly(kernel.to(torch.float64).sum((2, 3)))
    scaled = scale_to_bound(kernel, enclosure, 1.0)
    total = scaled.to(torch.float64).sum((2, 3))  # exact: 9 terms of 8 bits
    assert norm_at_most(total, 1.0) and not norm_at_most(total, 0.98)


def test_modes():
    small = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    enclosure = enclose_exactly(small)
    assert scale_to_bound(small, enclosure, 1.0, "clip").data_ptr() == small.data_ptr()
    assert scale_to_bound(small, enclosure, 1.0, "divide").amax() > 0.99
    assert scale_to_bound(small, enclosure, 0.25, "clip").amax() <= 0.25
    zero = torch.zeros(2, 3)
    for mode in ("divide", "clip"):
        assert not scale_to_bound(zero, enclose_exactly(zero), 1.0, mode).any()


def test_a_loose_enclosure_is_made_up_for_by_measuring():
    weight = gaussian(4, 4, 3).float()
    loose = enclose_exactly(weight).upper * 1.5
    scaled = scale_to_bound(weight, Enclosure(0.0, loose, "proved", "loose"), 1.0, measure=enclose_exactly)
    assert norm_at_most(scaled, 1.0)


@pytest.mark.parametrize(
    ("weight", "bound", "mode", "error", "says"),
    [
        (torch.ones(2, 2), 0.0, "divide", ArgumentError, "positive finite"),
        (torch.ones(2, 2), math.nan, "divide", ArgumentError, "positive finite"),
        (torch.ones(2, 2), math.inf, "divide", ArgumentError, "positive finite"),
        (torch.ones(2, 2), 1.0, "cap", ArgumentError, "'divide' or 'clip'"),
        (torch.ones(2), 1.0, "divide", ArgumentError, "neither a matrix"),
        (torch.ones(2, 2, dtype=torch.int8), 1.0, "divide", WeightError, "int8"),
        (torch.tensor([[math.nan]]), 1.0, "divide", WeightError, "NaN"),
        (torch.tensor([[math.inf]]), 1.0, "divide", WeightError, "infinite"),
        (torch.ones(2, 2).half(), 1e9, "divide", ArgumentError, "largest number is 65504"),
        (torch.ones(2, 2).half(), 1e-12, "divide", ArgumentError, "rounded to zero"),
    ],
)
def test_what_cannot_be_done_says_so(weight, bound, mode, error, says):
    with pytest.raises(error, match=says):
        scale_to_bound(weight, Enclosure(0.0, 2.0, "proved", "given"), bound, mode)


def test_a_norm_that_never_fits_is_an_error():
    never = Enclosure(2.0, 2.0, "proved", "constant")
    with pytest.raises(WeightError, match="no scaling"):
        scale_to_bound(torch.ones(2, 2), never, 1.0, measure=lambda _: never)


def test_flushed_subnormals_are_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(ArithmeticModeError):
            scale_to_bound(torch.ones(2, 2), Enclosure(2.0, 2.0, "proved", "given"))
    finally:
        torch.set_flush_denormal(False)
