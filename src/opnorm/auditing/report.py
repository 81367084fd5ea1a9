"""What an audit found, as pure data."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from opnorm._enclosure import Enclosure, Guarantee

SkipKind = Literal["vector", "dtype", "part", "nonfinite", "empty", "mask", "ambiguous", "failed", "left"]
"""Why something was not measured:
`vector` (bias, scale, running statistic), `dtype` (integers, quantised, fp8), `part` (of another weight), `nonfinite`,
`empty`, `mask`, `ambiguous` (which matrix is meant cannot be told), `failed` (an error), `left` (a part of a nested
file that holds no weights of the model)."""

UNBOUNDED: frozenset[SkipKind] = frozenset({"nonfinite", "failed", "ambiguous"})
"""Kinds that may hide a large norm: a rule about norms counts them as violations."""


@dataclass(frozen=True)
class Row:
    """One measured matrix or convolution.

    Attributes:
        name: canonical; a part of a tensor has its index in brackets, such as "in_proj_weight[q]".
        shape: of what was measured.
        dtype: as stored.
        role: how the tensor was read: "linear", "conv2d", "embedding", ...
        elements: number of stored elements that the row accounts for.
        share: of all elements in the file, between 0 and 1.
        enclosure: of the operator norm.
        frobenius: the Frobenius norm of the tensor, in float64.
        stable_rank: `(frobenius / upper)^2`, never overstated; for a convolution, per output position.
        aliases: other names of the same memory (tied weights).
        note: what the numbers are valid for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    elements: int
    share: float
    enclosure: Enclosure
    frobenius: float
    stable_rank: float
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def upper(self) -> float:
        """The upper end of the enclosure."""
        return self.enclosure.upper

    @property
    def lower(self) -> float:
        """The lower end of the enclosure."""
        return self.enclosure.lower

    @property
    def gap(self) -> float:
        """`upper / lower - 1`."""
        return self.enclosure.gap


@dataclass(frozen=True)
class Skipped:
    """A tensor, or a part of the file, that was not measured, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    share: float
    kind: SkipKind
    reason: str


@dataclass(frozen=True)
class Violation:
    """A rule and the tensor that breaks it."""

    rule: str
    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The result of an audit. `rows` and `skipped` together account for every element of the file.

    Attributes:
        source: what was audited.
        format: of the file; "module" for a model in memory.
        taken: the part of a nested file that was taken; "" for all of it.
        guarantee: that was asked for; each row says what it has.
        rtol: the gap that was asked for.
        elements: of the file, counted without looking at rows and skipped; tied weights once.
        rows: what was measured, in the order of the file.
        skipped: everything else.
        rules: that were checked.
        violations: of these rules.
        seconds: of wall-clock time.
        versions: of opnorm and what it computed with.
    """

    source: str
    format: str
    taken: str
    guarantee: Guarantee
    rtol: float
    elements: int
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    rules: tuple[str, ...] = ()
    violations: tuple[Violation, ...] = ()
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @cached_property
    def measured_elements(self) -> int:
        """Number of elements that the rows account for."""
        return sum(row.elements for row in self.rows)

    @cached_property
    def skipped_elements(self) -> int:
        """Number of elements that were not measured."""
        return sum(item.elements for item in self.skipped)

    @cached_property
    def largest(self) -> Row | None:
        """The row with the largest upper end."""
        return max(self.rows, key=lambda row: row.upper, default=None)

    @cached_property
    def kinds(self) -> dict[SkipKind, int]:
        """How often something was skipped for each kind of reason, the most frequent first."""
        return dict(Counter(item.kind for item in self.skipped).most_common())

    @property
    def ok(self) -> bool:
        """Whether no rule is violated."""
        return not self.violations

    @cached_property
    def summary(self) -> str:
        """One line: how much was measured, the largest norm, what was skipped, and the verdict."""
        share = self.measured_elements / self.elements if self.elements else 0.0
        weights = "weight" if len(self.rows) == 1 else "weights"
        parts = [f"{len(self.rows)} {weights} measured ({share:.1%} of {self.elements:,} elements)"]
        if self.largest is not None:
            parts.append(f"largest norm {self.largest.upper:.6g} ({self.largest.name})")
        weakest = sorted({row.enclosure.guarantee for row in self.rows}, key=("estimate", "probable", "proved").index)
        if weakest:
            worst = max(row.gap for row in self.rows)
            parts.append(f"{weakest[0]}, gaps up to {worst:.1e}")
        if self.skipped:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
            parts.append(f"{len(self.skipped)} not measured ({counts})")
        if self.rules:
            parts.append(f"{len(self.violations)} violations" if self.violations else "no rule violated")
        return "; ".join(parts)
