"""An audit: policy and checkpoint -> report, one tensor in memory at a time."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from os import PathLike, fspath

import torch
from torch import Tensor, nn

from opnorm._enclosure import Guarantee
from opnorm._version import __version__
from opnorm.auditing.geometry import Geometry
from opnorm.auditing.measure import count_nonfinite, enclose, frobenius, stable_rank
from opnorm.auditing.report import Report, Row, SkipKind, Skipped
from opnorm.auditing.roles import MATRIX, Unread, parse_roles, read
from opnorm.auditing.rules import Rule, check, parse
from opnorm.checkpoint import Checkpoint, Entry, Left, open_checkpoint, open_state
from opnorm.errors import ArgumentError, ArithmeticModeError, OpnormError
from opnorm.norms.memory import keep_freed_memory

Progress = Callable[[int, int, str], None]
"""Called with the elements done, all elements, and the name of the tensor that comes next."""

DEFAULT_RTOL: dict[Guarantee, float] = {"proved": 1e-4, "probable": 1e-3, "estimate": 1e-4}


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


def audit(
    source: str | PathLike[str] | nn.Module,
    *,
    guarantee: Guarantee = "proved",
    rtol: float | None = None,
    fail_on: Iterable[str] = (),
    roles: Iterable[str] = (),
    part: str = "",
    progress: Progress | None = None,
) -> Report:
    """Enclose the norm of every weight of a checkpoint or a model.

    Args:
        source: a path that `opnorm.checkpoint.open_checkpoint` reads, or a model; only a model knows the strides,
            groups and paddings of its convolutions.
        guarantee: what every upper end must hold: "proved", "probable" or "estimate".
        rtol: a target for `upper / lower - 1`; where it cannot be met the enclosure is wider, never weaker. None stands
            for 1e-4, and for 1e-3 where the guarantee is "probable".
        fail_on: rules such as "upper>10"; what breaks them is in `Report.violations`.
        roles: how tensors are to be read, as "PATTERN=ROLE", where their names and shapes do not tell.
        part: of a nested torch file, such as "ema".
        progress: called before each tensor.

    Returns:
        A report whose rows and skipped tensors account for every element.

    Raises:
        CheckpointError: if the file cannot be read.
        ArgumentError: for a rule or a role that cannot be read.

    Example:
        >>> import torch, opnorm
        >>> report = opnorm.audit(torch.nn.Linear(3, 2), fail_on=["upper>100"])
        >>> [row.name for row in report.rows], [item.name for item in report.skipped], report.ok
        (['weight'], ['bias'], True)
    """
    if guarantee not in DEFAULT_RTOL:
        raise ArgumentError(f"guarantee is one of {', '.join(DEFAULT_RTOL)}, got {guarantee!r}")
    target = DEFAULT_RTOL[guarantee] if rtol is None else rtol
    if not 0.0 < target < inf:
        raise ArgumentError(f"rtol must be a positive number, got {rtol!r}")
    policy = Policy(guarantee, target, tuple(map(parse, fail_on)), parse_roles(roles))
    if isinstance(source, str | PathLike):
        return _report(open_checkpoint(source, part), fspath(source), policy, Geometry({}), progress)
    if isinstance(source, nn.Module):
        label = type(source).__name__
        return _report(open_state(_tensors(source), label), label, policy, Geometry.of(source), progress)
    raise ArgumentError(f"cannot audit a {type(source).__name__}: give a path or a torch.nn.Module")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without the extra state that modules may keep beside their tensors."""
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _report(
    checkpoint: Checkpoint, source: str, policy: Policy, geometry: Geometry, progress: Progress | None
) -> Report:
    start = time.perf_counter()
    keep_freed_memory()
    total = checkpoint.elements
    rows, skipped, done = [], [_left(part, total) for part in checkpoint.left], 0
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    for entry in checkpoint.entries:
        if progress is not None:
            progress(done, total, entry.name)
        for item in _audited(entry, shapes, policy, geometry, total):
            if isinstance(item, Row):
                rows.append(item)
            else:
                skipped.append(item)
        done += entry.elements
    return Report(
        source=source,
        format=checkpoint.format,
        taken=checkpoint.taken,
        guarantee=policy.guarantee,
        rtol=policy.rtol,
        elements=total,
        rows=tuple(rows),
        skipped=tuple(skipped),
        rules=tuple(rule.text for rule in policy.rules),
        violations=check(policy.rules, rows, skipped),
        seconds=time.perf_counter() - start,
        versions={"opnorm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def _left(part: Left, total: int) -> Skipped:
    reason = f"{part.reason} ({part.tensors} tensors)" if part.tensors else part.reason
    return Skipped(part.name, (), "", part.elements, _share(part.elements, total), "left", reason)


def _share(elements: int, total: int) -> float:
    return elements / total if total else 0.0


def _audited(
    entry: Entry, shapes: Mapping[str, tuple[int, ...]], policy: Policy, geometry: Geometry, total: int
) -> Iterator[Row | Skipped]:
    """Yield what becomes of one tensor: one row, several (stacked matrices), or the reason why there is none."""

    def skip(kind: SkipKind, reason: str, name: str = entry.name, elements: int = entry.elements) -> Skipped:
        return Skipped(name, entry.shape, entry.dtype, elements, _share(elements, total), kind, reason)

    reading = read(entry.name, entry.shape, shapes, policy.roles)
    if entry.unusable and not (isinstance(reading, Unread) and reading.kind == "empty"):
        yield skip("part" if " of " in entry.unusable else "dtype", entry.unusable)
        return
    if isinstance(reading, Unread):
        yield skip(reading.kind, reading.reason)
        return
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
            share=_share(elements, total),
            enclosure=enclosure,
            frobenius=size,
            stable_rank=stable_rank(size, enclosure.upper),
            aliases=entry.aliases,
            note="; ".join(dict.fromkeys(filter(None, notes))),
        )
