"""An audit: policy and checkpoint -> report, one tensor in memory at a time."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite, prod
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from torch import Tensor

import opnorm
from opnorm._enclosure import Guarantee
from opnorm.audit import measure, roles, rules
from opnorm.audit.report import Report, Row, Skipped
from opnorm.checkpoint import Checkpoint, Entry, open_checkpoint
from opnorm.errors import ArgumentError, ArithmeticModeError, OpnormError

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int, str], None]
"""Called with the elements done, all elements, and the name of the tensor that comes next."""

DEFAULT_RTOL = 1e-3


@dataclass(frozen=True)
class Policy:
    """What to measure and when to fail.

    Attributes:
        guarantee: what every upper end must hold.
        rtol: a target for the gap.
        rules: conditions that make the audit fail.
        roles: patterns and roles given by hand.
    """

    guarantee: Guarantee = "proved"
    rtol: float = DEFAULT_RTOL
    rules: tuple[rules.Rule, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()


def audit(
    source: "str | PathLike[str] | nn.Module",
    *,
    guarantee: Guarantee = "proved",
    rtol: float = DEFAULT_RTOL,
    fail_on: Iterable[str] = (),
    roles: Iterable[str] = (),
    part: str = "",
    progress: Progress | None = None,
) -> Report:
    """Enclose the norm of every weight of a checkpoint or a model.

    Args:
        source: a path that `opnorm.checkpoint.open_checkpoint` reads, or a model; only a model knows the strides, groups
            and paddings of its convolutions.
        guarantee: what every upper end must hold: "proved", "probable" or "estimate".
        rtol: a target for `upper / lower - 1`; where it cannot be met the enclosure is wider, never weaker.
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
    if rtol <= 0.0 or not isfinite(rtol):
        raise ArgumentError(f"rtol must be a positive number, got {rtol!r}")
    policy = Policy(guarantee, rtol, tuple(map(rules_parse, fail_on)), roles_parse(roles))
    if isinstance(source, str | PathLike):
        return audit_checkpoint(open_checkpoint(source, part), policy, fspath(source), progress)
    raise ArgumentError(f"cannot audit a {type(source).__name__}: give a path or a torch.nn.Module")


rules_parse, roles_parse = rules.parse, roles.parse_roles
