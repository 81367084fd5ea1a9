"""Rules: what they mean, what is refused, and that what cannot be bounded breaks them."""

import pytest

from opnorm import Enclosure
from opnorm.auditing.report import Row, SkipKind, Skipped
from opnorm.auditing.rules import check, parse
from opnorm.errors import ArgumentError

ROW = Row("w", (2, 2), "float32", "linear", 4, 0.5, Enclosure(1.0, 2.0, "proved", "dense"), 2.0, 1.5)

RULES = [
    ("upper>1.5", True),
    ("upper>2", False),
    ("upper>=2", True),
    ("upper > 1e0", True),
    ("lower<1", False),
    ("lower<=1", True),
    ("gap>0.5", True),
    ("gap>1e-3", True),
    ("frobenius==2", True),
    ("frobenius!=2", False),
    ("stable_rank<2", True),
    ("share>0.6", False),
    ("elements>=4", True),
    ("upper>inf", False),
]


@pytest.mark.parametrize(("text", "broken"), RULES)
def test_rules_compare_a_field_with_a_number(text: str, broken: bool) -> None:
    assert bool(check([parse(text)], [ROW], [])) is broken


REFUSED = [
    "",
    "upper",
    "upper>",
    ">10",
    "upper>ten",
    "upper>nan",
    "upper>>1",
    "name>1",
    "__class__>1",
    "upper>1 or 1",
    "1<upper",
    "upper>__import__('os').getpid()",
    "enclosure.upper>1",
]


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="fields: upper, lower"):
        parse(text)


KINDS: list[tuple[SkipKind, bool]] = [
    ("nonfinite", True),
    ("failed", True),
    ("ambiguous", True),
    ("vector", False),
    ("dtype", False),
    ("left", False),
    ("empty", False),
]


@pytest.mark.parametrize(("kind", "broken"), KINDS)
def test_what_may_hide_a_large_norm_breaks_every_rule(kind: SkipKind, broken: bool) -> None:
    item = Skipped("w", (2, 2), "float32", 4, 0.5, kind, "some reason")
    assert bool(check([parse("upper>1e300")], [], [item])) is broken
