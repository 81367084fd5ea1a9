"""The enclosure's algebra rounds outward, keeps the weaker guarantee, and prints ends that are ends."""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opnorm import Enclosure

quick = settings(deadline=None, derandomize=True, max_examples=200)
ends = st.floats(allow_nan=False, allow_infinity=False, min_value=0.0)
pairs = st.tuples(ends, ends).map(sorted)


def enclosure(pair, guarantee="proved", method="m", **options):
    return Enclosure(pair[0], pair[1], guarantee, method, **options)


@pytest.mark.parametrize("lower, upper", [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_ends_that_enclose_nothing_are_refused(lower, upper):
    with pytest.raises(ValueError, match="lower <= upper"):
        Enclosure(lower, upper, "proved", "m")


def test_unknown_guarantees_are_refused():
    with pytest.raises(ValueError, match="guarantee"):
        Enclosure(0.0, 1.0, "sure", "m")


@pytest.mark.parametrize(
    "lower, upper, gap", [(0.0, 0.0, 0.0), (2.0, 2.0, 0.0), (0.0, 1.0, math.inf), (1.0, math.inf, math.inf)]
)
def test_gap_at_its_ends(lower, upper, gap):
    assert Enclosure(lower, upper, "proved", "m").gap == gap


@quick
@given(pairs)
def test_gap_is_rounded_up(pair):
    found = enclosure(pair).gap
    if pair[0] > 0 and found < math.inf:
        assert Fraction(found) >= Fraction(pair[1]) / Fraction(pair[0]) - 1


def test_met_membership_and_float():
    one = Enclosure(1.0, 1.5, "proved", "m", rtol=0.5)
    assert one.met is False or one.gap <= 0.5
    assert Enclosure(1.0, 1.4, "proved", "m", rtol=0.5).met
    assert not Enclosure(1.0, 1.6, "proved", "m", rtol=0.5).met
    assert Enclosure(1.0, 9.0, "proved", "m").met
    assert 1.0 in one and 1.5 in one and math.nextafter(1.5, 2) not in one and math.nextafter(1.0, 0) not in one
    assert float(one) == 1.5


@quick
@given(pairs, pairs)
def test_products_are_rounded_outward(first, second):
    product = enclosure(first) * enclosure(second)
    assert Fraction(product.lower) <= Fraction(first[0]) * Fraction(second[0])
    assert product.upper == math.inf or Fraction(product.upper) >= Fraction(first[1]) * Fraction(second[1])


@quick
@given(pairs, ends)
def test_scaling_is_rounded_outward(pair, factor):
    scaled = enclosure(pair).scaled(factor)
    assert Fraction(scaled.lower) <= Fraction(pair[0]) * Fraction(factor)
    assert scaled.upper == math.inf or Fraction(scaled.upper) >= Fraction(pair[1]) * Fraction(factor)


def test_the_weaker_guarantee_and_the_sum_of_the_chances_survive():
    proved = Enclosure(1.0, 2.0, "proved", "a")
    probable = Enclosure(1.0, 3.0, "probable", "b", failure_probability=1e-12)
    other = Enclosure(0.5, 1.0, "probable", "c", failure_probability=1e-12)
    estimate = Enclosure(0.0, 1.0, "estimate", "d")
    assert (proved * probable).guarantee == "probable" and (probable * estimate).guarantee == "estimate"
    assert 2e-12 <= (probable * other).failure_probability <= 2.01e-12
    certain = Enclosure(0.0, 5.0, "probable", "e", failure_probability=0.8)
    assert (certain * Enclosure(0.0, 5.0, "probable", "e", failure_probability=0.8)).failure_probability == 1.0


def test_maximum():
    proved = Enclosure(1.8, 2.0, "proved", "a")
    probable = Enclosure(1.0, 3.0, "probable", "b", failure_probability=1e-12)
    for parts in ([proved, probable], [probable, proved]):
        top = Enclosure.maximum(iter(parts))
        assert (top.lower, top.upper, top.method, top.guarantee) == (1.8, 3.0, "b", "probable")
        assert 1e-12 <= top.failure_probability < 1.01e-12  # one chance is counted once
    assert Enclosure.maximum([proved]) == proved
    with pytest.raises(ValueError, match="no enclosures"):
        Enclosure.maximum([])


def test_meet_never_replaces_a_proof():
    proved = Enclosure(1.0, 3.0, "proved", "a")
    probable = Enclosure(1.5, 2.0, "probable", "b")
    better = Enclosure(1.2, 2.5, "proved", "c")
    for first, second in [(proved, probable), (probable, proved)]:
        met = first.meet(second)
        assert (met.lower, met.upper, met.guarantee, met.method) == (1.5, 3.0, "proved", "a")
    assert (better.meet(proved).upper, proved.meet(better).method) == (2.5, "c")


@quick
@given(pairs)
def test_printed_ends_are_ends(pair):
    found = re.match(r"(\S+) <= norm <= (\S+) \(gap", str(enclosure(pair)))
    assert float(found[1]) <= pair[0] and float(found[2]) >= pair[1]


def test_what_is_printed():
    text = str(Enclosure(1.0, 2.0, "probable", "lanczos", 0.1, 1e-12, "for every size"))
    for part in ("1 <= norm <= 2", "rtol", "probable", "1e-12", "lanczos", "for every size"):
        assert part in text
    assert "rtol" not in str(Enclosure(1.0, 1.0, "proved", "m", 0.1))
