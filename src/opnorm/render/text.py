"""Numbers and names as text: printed ends are ends as well, and names cannot steer a terminal."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

DIGITS = 7


def ceiling(value: float, digits: int = DIGITS) -> str:
    """Return `value` with a few digits, never below it.

    Example:
        >>> ceiling(1.00000001), ceiling(2.0)
        ('1.000001', '2')
    """
    return _directed(value, digits, ROUND_CEILING)


def floor(value: float, digits: int = DIGITS) -> str:
    """Return `value` with a few digits, never above it."""
    return _directed(value, digits, ROUND_FLOOR)


def _directed(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{float(Context(prec=digits, rounding=rounding).create_decimal(Decimal(value))):.{digits}g}"


def printable(name: str) -> str:
    r"""Return `name` with everything that does not print, such as escape sequences, written out.

    Example:
        >>> print(printable("a" + chr(27) + "[31mb"))
        a\x1b[31mb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def shaped(shape: tuple[int, ...]) -> str:
    """Return a shape as "64×3×3"."""
    return "×".join(map(str, shape))
