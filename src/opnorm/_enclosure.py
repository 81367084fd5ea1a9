"""The result of every measurement: a lower and an upper end, with the guarantee that they carry."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from opnorm import _rounding as rounding

Guarantee = Literal["proved", "probable", "estimate"]
_STRENGTH: dict[Guarantee, int] = {"proved": 2, "probable": 1, "estimate": 0}


@dataclass(frozen=True)
class Enclosure:
    """Two ends between which an operator norm lies, and the guarantee for that.

    Guarantees:
        - `proved`: holds for the stored weights in exact arithmetic, the rounding errors of the computation included.
        - `probable`: holds except with probability `failure_probability` over a random start of our own.
        - `estimate`: no guarantee for the upper end; the lower end is attained.

    Attributes:
        lower: the largest gain that was shown to be attained.
        upper: the end that is safe to divide by.
        guarantee: what may be relied on.
        method: the algorithm that gave the upper end.
        rtol: the gap that was asked for, or None where none was.
        failure_probability: probability that `upper` is too small; 0 unless `probable`.
        note: what a reader must know about the number, such as what it is valid for.

    Example:
        >>> from opnorm import Enclosure
        >>> e = Enclosure(1.9, 2.0, "proved", "dense", rtol=0.1)
        >>> float(e), round(e.gap, 4), e.met, 1.95 in e
        (2.0, 0.0526, True, True)
        >>> print(e)
        1.9 <= norm <= 2 (gap 5.3e-02, proved, dense)
    """

    lower: float
    upper: float
    guarantee: Guarantee
    method: str
    rtol: float | None = None
    failure_probability: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse ends that enclose nothing."""
        if not 0.0 <= self.lower <= self.upper:
            raise ValueError(f"an enclosure needs 0 <= lower <= upper, got {self.lower!r} and {self.upper!r}")
        if self.guarantee not in _STRENGTH:
            raise ValueError(f"guarantee is one of {', '.join(_STRENGTH)}, got {self.guarantee!r}")

    @property
    def gap(self) -> float:
        """`upper / lower - 1`, rounded up; 0 for 0/0 and inf for a lower end of 0."""
        if self.lower == self.upper:
            return 0.0
        if self.lower == 0.0 or math.isinf(self.upper):
            return math.inf
        # The difference first: the quotient of two close floats loses what the gap is about.
        return rounding.div_up(rounding.up(self.upper - self.lower), self.lower)

    @property
    def met(self) -> bool:
        """Whether the gap is within the target `rtol`; True where no target was given."""
        return self.rtol is None or self.gap <= self.rtol

    def __contains__(self, value: float) -> bool:
        """Whether `lower <= value <= upper`, without tolerance."""
        return self.lower <= value <= self.upper

    def __float__(self) -> float:
        """The upper end, the only one that is safe to divide by."""
        return self.upper

    def __mul__(self, other: "Enclosure") -> "Enclosure":
        """The enclosure of the product of two enclosed numbers, rounded outward.

        The norm of a Kronecker product is such a product; the norm of a composition is only bounded by it from above.
        """
        return replace(
            self._joined(other),
            lower=rounding.mul_down(self.lower, other.lower),
            upper=rounding.mul_up(self.upper, other.upper),
            method=self.method if self.method == other.method else f"{self.method} x {other.method}",
        )

    def scaled(self, factor: float) -> "Enclosure":
        """The enclosure of `factor` times the number, for an exact `factor >= 0`, rounded outward."""
        return replace(self, lower=rounding.mul_down(self.lower, factor), upper=rounding.mul_up(self.upper, factor))

    def meet(self, other: "Enclosure") -> "Enclosure":
        """The best ends of two enclosures of the same number; the upper end keeps the method that gave it.

        A `proved` upper end is never replaced by a weaker one.
        """
        strong = max((self, other), key=lambda e: (_STRENGTH[e.guarantee], -e.upper))
        return replace(strong, lower=max(self.lower, other.lower))

    @staticmethod
    def maximum(items: "Iterable[Enclosure]") -> "Enclosure":
        """The enclosure of the maximum, such as the norm of a block-diagonal map.

        Raises:
            ValueError: if there is nothing to take the maximum of.
        """
        parts = list(items)
        if not parts:
            raise ValueError("the maximum of no enclosures")
        highest = max(parts, key=lambda e: e.upper)
        joined = highest
        for part in parts:
            if part is not highest:
                joined = joined._joined(part)
        return replace(joined, lower=max(part.lower for part in parts))

    def _joined(self, other: "Enclosure") -> "Enclosure":
        """`self` with the weaker of the two guarantees and the sum of the failure probabilities."""
        weaker = min(self.guarantee, other.guarantee, key=_STRENGTH.__getitem__)
        if other is self:
            return self
        chance = rounding.add_up(self.failure_probability, other.failure_probability)
        return replace(self, guarantee=weaker, failure_probability=min(1.0, chance))

    def __str__(self) -> str:
        """Both ends, the gap, the guarantee and the method, in one line."""
        chance = f", fails with probability <= {self.failure_probability:.0e}" if self.failure_probability else ""
        note = f"; {self.note}" if self.note else ""
        missed = "" if self.met else f" > rtol {self.rtol:.0e}"
        return (
            f"{_shown(self.lower, down=True)} <= norm <= {_shown(self.upper, down=False)} "
            f"(gap {self.gap:.1e}{missed}, {self.guarantee}{chance}, {self.method}{note})"
        )


def _shown(value: float, *, down: bool) -> str:
    """Eight digits, moved outward where rounding them moved inward: a printed end is an end as well."""
    text = f"{value:.8g}"
    shown = float(text)
    if math.isinf(value) or (shown <= value if down else shown >= value):
        return text
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 7)
    return f"{value - step if down else value + step:.8g}"
