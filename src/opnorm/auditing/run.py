"""An audit: policy and checkpoint -> report, one large tensor in memory at a time."""

import platform
import time
from collections.abc import Callable, Iterable
from itertools import chain
from math import inf
from os import PathLike, fspath

import torch
from torch import Tensor, nn

from opnorm._enclosure import Guarantee
from opnorm._version import __version__
from opnorm.auditing.geometry import Geometry
from opnorm.auditing.report import Report, Row, Skipped
from opnorm.auditing.roles import parse_roles
from opnorm.auditing.rules import check, parse
from opnorm.auditing.side_by_side import side_by_side
from opnorm.auditing.tensor import Policy, audited, share
from opnorm.checkpoint import Checkpoint, Entry, Left, open_checkpoint, open_state
from opnorm.errors import ArgumentError
from opnorm.norms.memory import keep_freed_memory

Progress = Callable[[int, int, str], None]
"""Called with the elements done, all elements, and the name of the tensor that comes next."""

DEFAULT_RTOL: dict[Guarantee, float] = {"proved": 1e-4, "probable": 1e-3, "estimate": 1e-4}


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
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    done = 0

    def begin(entry: Entry) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, entry.name)
        done += entry.elements

    found = side_by_side(lambda entry: list(audited(entry, shapes, policy, geometry, total)), checkpoint.entries, begin)
    items = list(chain.from_iterable(found))
    rows = [item for item in items if isinstance(item, Row)]
    skipped = [_left(part, total) for part in checkpoint.left]
    skipped += [item for item in items if isinstance(item, Skipped)]
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
    return Skipped(part.name, (), "", part.elements, share(part.elements, total), "left", reason)
