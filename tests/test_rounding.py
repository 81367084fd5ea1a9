"""Directed rounding against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opnorm import _rounding as rounding

quick = settings(deadline=None, derandomize=True, max_examples=150)
finite = st.floats(allow_nan=False, allow_infinity=False, min_value=0.0)
positive = st.floats(allow_nan=False, allow_infinity=False, min_value=5e-324)
signed = st.floats(allow_nan=False, allow_infinity=False)


def above(bound, exact):
    return bound == math.inf or Fraction(bound) >= exact


@quick
@given(st.lists(signed, max_size=6))
def test_sums_are_rounded_up(terms):
    assert above(rounding.add_up(*terms), sum(map(Fraction, terms))) or any(abs(t) > 1e307 for t in terms)


@quick
@given(finite, finite, finite)
def test_products_lie_between(x, y, z):
    exact = Fraction(x) * Fraction(y) * Fraction(z)
    assert above(rounding.mul_up(x, y, z), exact)
    assert 0 <= Fraction(rounding.mul_down(x, y, z)) <= exact


@quick
@given(finite, positive)
def test_quotients_lie_between(x, y):
    exact = Fraction(x) / Fraction(y)
    assert above(rounding.div_up(x, y), exact)
    assert 0 <= Fraction(rounding.div_down(x, y)) <= exact


@quick
@given(finite)
def test_square_roots_lie_between(x):
    assert Fraction(rounding.sqrt_up(x)) ** 2 >= Fraction(x) >= Fraction(rounding.sqrt_down(x)) ** 2


@quick
@given(finite, st.integers(-2200, 2200))
def test_powers_of_two_lie_between(x, exponent):
    exact = Fraction(x) * Fraction(2) ** exponent
    assert above(rounding.ldexp_up(x, exponent), exact)
    assert 0 <= Fraction(rounding.ldexp_down(x, exponent)) <= exact


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000, 2**20, 2**40, 2**51])
def test_gamma_is_above_its_formula(n):
    exact = n * Fraction(1, 2**53) / (1 - n * Fraction(1, 2**53))
    assert exact <= Fraction(rounding.gamma(n)) <= exact * (1 + Fraction(1, 2**50))


def test_gamma_refuses_sums_that_lose_every_digit():
    with pytest.raises(OverflowError):
        rounding.gamma(2**52)


def test_what_is_exact_stays():
    assert rounding.mul_up(1.0, 0.1) == rounding.mul_down(0.1, 1.0) == rounding.div_up(0.1, 1.0) == 0.1
    assert rounding.sqrt_up(9.0) == rounding.sqrt_down(9.0) == 3.0
    assert rounding.mul_up(0.0, math.inf) == 0.0
    assert rounding.ldexp_up(3.0, 5) == rounding.ldexp_down(3.0, 5) == 96.0
    assert rounding.ldexp_up(1.0, 2000) == math.inf and rounding.ldexp_down(1.0, 2000) < math.inf
    assert rounding.ldexp_up(1.0, -2000) == 5e-324 and rounding.ldexp_down(1.0, -2000) == 0.0
