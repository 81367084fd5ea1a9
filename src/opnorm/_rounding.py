"""Directed rounding on Python floats, and the constants of the rounding-error bounds.

Python's arithmetic rounds to nearest; one `math.nextafter` step outward after an operation therefore encloses its
exact result. Every scalar that ends in a proved bound goes through these functions.
"""

import math
from collections.abc import Callable

U = 2.0**-53
"""Unit roundoff of float64."""

TINY = 2.0**-1022
"""The smallest normal float64: what one operation can lose to underflow, flush-to-zero included."""


def up(x: float) -> float:
    """Return a float above `x`; the result of one rounded operation enclosed from above."""
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """Return a float below `x`; the result of one rounded operation enclosed from below."""
    return math.nextafter(x, -math.inf)


def add_up(*terms: float) -> float:
    """Return an upper bound of the sum of `terms`."""
    total = 0.0
    for term in terms:
        total = up(total + term) if term != 0.0 else total
    return total


def mul_up(*factors: float) -> float:
    """Return an upper bound of the product of non-negative `factors`; zero stays zero, as 0 * inf does."""
    return _product(factors, up)


def mul_down(*factors: float) -> float:
    """Return a lower bound, at least 0, of the product of non-negative `factors`."""
    return _product(factors, lambda x: max(0.0, down(x)))


def _product(factors: tuple[float, ...], outward: Callable[[float], float]) -> float:
    if any(factor == 0.0 for factor in factors):
        return 0.0
    total = factors[0]
    for factor in factors[1:]:
        # A factor of one is exact and must not widen the result.
        total = total if factor == 1.0 else factor if total == 1.0 else outward(total * factor)
    return total


def div_up(x: float, y: float) -> float:
    """Return an upper bound of `x / y` for `x >= 0`, `y > 0`."""
    return x if y == 1.0 or x == 0.0 else up(x / y)


def div_down(x: float, y: float) -> float:
    """Return a lower bound, at least 0, of `x / y` for `x >= 0`, `y > 0`."""
    return x if y == 1.0 or x == 0.0 else max(0.0, down(x / y))


def sqrt_up(x: float) -> float:
    """Return an upper bound of the square root; exact squares of integers stay as they are."""
    root = math.sqrt(x)
    return root if root.is_integer() and root <= 2.0**26 and root * root == x else up(root)


def sqrt_down(x: float) -> float:
    """Return a lower bound of the square root of `x`, and 0 for what rounding made negative."""
    if x <= 0.0:
        return 0.0
    root = math.sqrt(x)
    return root if root.is_integer() and root <= 2.0**26 and root * root == x else max(0.0, down(root))


def gamma(n: int) -> float:
    """Return an upper bound of `n u / (1 - n u)`, Higham's constant for `n` roundings in float64.

    Raises:
        OverflowError: if `n` is so large that the error analysis says nothing.
    """
    nu = up(n * U)
    if nu >= 0.5:
        raise OverflowError(f"no rounding-error bound for a sum of {n} terms in float64")
    return 0.0 if n == 0 else up(nu / down(1.0 - nu))


def ldexp_up(x: float, exponent: int) -> float:
    """Return an upper bound of `x * 2**exponent`: exact unless it under- or overflows."""
    return _ldexp(x, exponent, math.inf)


def ldexp_down(x: float, exponent: int) -> float:
    """Return a lower bound, at least 0 for `x >= 0`, of `x * 2**exponent`."""
    return _ldexp(x, exponent, 0.0)


def _ldexp(x: float, exponent: int, towards: float) -> float:
    try:
        scaled = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf if towards == math.inf else math.nextafter(math.inf, 0.0)
    exact = abs(scaled) >= TINY or math.ldexp(scaled, -exponent) == x
    return scaled if exact else math.nextafter(scaled, towards)
