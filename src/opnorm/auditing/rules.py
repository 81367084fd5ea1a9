"""Rules such as `upper>10`: parsed by a pattern, never evaluated as code."""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opnorm.auditing.report import UNBOUNDED, Row, Skipped, Violation
from opnorm.errors import ArgumentError

FIELDS = ("upper", "lower", "gap", "frobenius", "stable_rank", "share", "elements")

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_RULE = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Rule:
    """A condition on a row that makes the audit fail."""

    text: str
    field: str
    sign: str
    limit: float

    def broken_by(self, row: object) -> bool:
        """Whether the row, or what else has the field, fulfils the condition, and so fails."""
        return _OPERATORS[self.sign](float(getattr(row, self.field)), self.limit)


def parse(text: str, fields: tuple[str, ...] = FIELDS) -> Rule:
    """Read a rule on one of the fields.

    Raises:
        ArgumentError: if it is not FIELD SIGN NUMBER.

    Example:
        >>> parse("stable_rank < 2")
        Rule(text='stable_rank<2', field='stable_rank', sign='<', limit=2.0)
    """
    match = _RULE.fullmatch(text)
    try:
        limit = float(match[3]) if match else math.nan
    except ValueError:
        limit = math.nan
    if match is None or match[1] not in fields or math.isnan(limit):
        raise ArgumentError(
            f"the rule {text!r} is not FIELD SIGN NUMBER, such as upper>10; fields: {', '.join(fields)}; "
            f"signs: {' '.join(_OPERATORS)}"
        )
    return Rule(f"{match[1]}{match[2]}{match[3]}", match[1], match[2], limit)


def check(rules: Iterable[Rule], rows: Iterable[Row], skipped: Iterable[Skipped]) -> tuple[Violation, ...]:
    """List what breaks the rules.

    A tensor whose norm could not be bounded (NaN or infinite values, an error, no telling which matrix is meant) breaks
    every rule: a guard that let it pass would guard nothing.
    """
    listed, unbounded = list(rows), [item for item in skipped if item.kind in UNBOUNDED]
    found = []
    for rule in rules:
        found += [
            Violation(rule.text, row.name, f"{rule.field} = {float(getattr(row, rule.field)):.6g}")
            for row in listed
            if rule.broken_by(row)
        ]
        found += [Violation(rule.text, item.name, f"not measured: {item.reason}") for item in unbounded]
    return tuple(found)
