"""What becomes of one tensor of a checkpoint: rows of the report, or the reason why there are none."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from opnorm._enclosure import Guarantee
from opnorm.auditing.geometry import Geometry
from opnorm.auditing.measure import count_nonfinite, enclose, frobenius, stable_rank
from opnorm.auditing.report import Row, SkipKind, Skipped
from opnorm.auditing.roles import MATRIX, Unread, read
from opnorm.auditing.rules import Rule
from opnorm.checkpoint import Entry
from opnorm.errors import ArithmeticModeError, OpnormError

_READING = threading.Lock()
"""Files have one position, and modules compute their weights once."""


@dataclass(frozen=True)
class Policy:
    """What to measure and when to fail.

    Attributes:
        guarantee: what every upper end must hold.
        rtol: a target for the gap.
        rules: conditions that make the audit fail.
        roles: patterns and roles given by hand.
    """

    guarantee: Guarantee
    rtol: float
    rules: tuple[Rule, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()


def share(elements: int, total: int) -> float:
    """Return the fraction of all elements."""
    return elements / total if total else 0.0


def audited(
    entry: Entry, shapes: Mapping[str, tuple[int, ...]], policy: Policy, geometry: Geometry, total: int
) -> Iterator[Row | Skipped]:
    """Yield what becomes of one tensor: one row, several (stacked matrices), or the reason why there is none."""

    def skip(kind: SkipKind, reason: str, name: str = entry.name, elements: int = entry.elements) -> Skipped:
        return Skipped(name, entry.shape, entry.dtype, elements, share(elements, total), kind, reason)

    reading = read(entry.name, entry.shape, shapes, policy.roles)
    if entry.unusable and not (isinstance(reading, Unread) and reading.kind == "empty"):
        yield skip("part" if " of " in entry.unusable else "dtype", entry.unusable)
        return
    if isinstance(reading, Unread):
        yield skip(reading.kind, reading.reason)
        return
    with _READING:
        tensor = geometry.weight(entry) if entry.remark else entry.load()
    parts = reading.parts or (("", slice(None)),)
    for index, (label, where) in enumerate(parts):
        name = f"{entry.name}[{label}]" if label else entry.name
        elements = entry.elements * (index + 1) // len(parts) - entry.elements * index // len(parts)
        piece = tensor[where]
        matrix = piece if reading.kernel else piece.reshape(piece.shape[-2:]) if piece.dim() > MATRIX else piece
        size = frobenius(matrix)
        if not isfinite(size):
            nans, infinite = count_nonfinite(matrix)
            yield skip("nonfinite", f"holds {nans} NaN and {infinite} infinite values: it has no norm", name, elements)
            continue
        try:
            layer = geometry.operator(entry) if reading.kernel else None
            enclosure = enclose(
                matrix if layer is None else layer, kernel=reading.kernel, rtol=policy.rtol, guarantee=policy.guarantee
            )
        except ArithmeticModeError:
            raise
        except OpnormError as error:
            yield skip("failed", " ".join(str(error).split()), name, elements)
            continue
        note = "the layer's own geometry, valid for every input size" if layer is not None else reading.note
        notes = [note, entry.derived, "" if geometry.knows(entry) else entry.remark, enclosure.note]
        yield Row(
            name=name,
            shape=tuple(matrix.shape),
            dtype=entry.dtype,
            role=reading.role,
            elements=elements,
            share=share(elements, total),
            enclosure=enclosure,
            frobenius=size,
            stable_rank=stable_rank(size, enclosure.upper),
            aliases=entry.aliases,
            note="; ".join(dict.fromkeys(filter(None, notes))),
        )
