"""A network's bounds as a plain-text table that follows the model's structure."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opnorm.network.result import NetworkBound, NodeBound


def table_of(bound: "NetworkBound") -> str:
    """One line for each step, indented below its modules, then the bounds of the whole network."""
    rows = [("step", "shape", "constant", "times", "so far", "")]
    homes = [_parted(node.place)[0] for node in bound.nodes]
    holds_more = {home[:depth] for home in homes for depth in range(len(home))}
    holds_more |= {home for home, after in pairwise(homes) if home == after}
    before: tuple[str, ...] = ()
    for position, node in enumerate(bound.nodes):
        modules, operation = _parted(node.place)
        if modules and modules not in holds_more:
            modules, operation = modules[:-1], f"{modules[-1]}: {operation}"
        common = next((i for i, pair in enumerate(zip(before, modules, strict=False)) if len(set(pair)) > 1), None)
        common = min(len(before), len(modules)) if common is None else common
        rows += [("  " * depth + modules[depth], "", "", "", "", "") for depth in range(common, len(modules))]
        before = modules
        size = "x".join(map(str, node.shape))
        numbers = (number(node.constant), number(node.contribution), number(node.bound))
        rows.append(("  " * len(modules) + operation, size, *numbers, _note(node, position, bound)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, 5)), row[5]]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 8))
    lines.append("")
    lines.append(f"{number(bound.lower, down=True)} <= Lipschitz constant <= {number(bound.upper)}")
    lines.append(f"({bound.guarantee}, {bound.method}; the product of the steps is {number(bound.product)})")
    if bound.pair is not None and bound.pair.guarantee == "estimate":
        lines.append("(the lower end is an estimate: the rounding of its evaluation has no bound or a large one)")
    lines += [f"note: {remark}" for remark in bound.remarks]
    return "\n".join(lines)


def _parted(place: str) -> tuple[tuple[str, ...], str]:
    """The modules that a step is in, and its operation."""
    path, colon, operation = place.rpartition(": ")
    return (tuple(path.split(".")), operation) if colon else ((), place)


def _note(node: "NodeBound", position: int, bound: "NetworkBound") -> str:
    """Why the constant is what it is, and what a step reads unless that is the line before it."""
    other = [i for i in node.sources if i != position - 1]
    reads = ", ".join(bound.nodes[i].place for i in other)
    return "; ".join(part for part in (node.note, f"reads {reads}" if other else "") if part)


def number(value: float, *, down: bool = False) -> str:
    """Six digits, rounded outward: a printed bound is a bound as well."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.6g}"
    if (float(text) <= value) if down else (float(text) >= value):
        return text
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return f"{value - step if down else value + step:.6g}"
