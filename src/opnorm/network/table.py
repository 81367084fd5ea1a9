"""A network's bounds as a plain-text table that follows the model's structure."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opnorm.network.bound import NetworkBound


def table_of(bound: "NetworkBound") -> str:
    """One line for each step, then the bounds of the whole network."""
    rows = [("step", "constant", "so far", "")]
    rows += [(n.place, number(n.constant), number(n.bound), n.note) for n in bound.nodes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 4))
    lines.append("")
    lines.append(f"{number(bound.lower, down=True)} <= Lipschitz constant <= {number(bound.upper)}")
    lines.append(f"({bound.guarantee}, {bound.method}; the product of the steps is {number(bound.product)})")
    if bound.pair is not None and bound.pair.guarantee == "estimate":
        lines.append("(the lower end is an estimate: a library's function is evaluated on the way)")
    lines += [f"note: {remark}" for remark in bound.remarks]
    return "\n".join(lines)


def number(value: float, *, down: bool = False) -> str:
    """Six digits, rounded outward: a printed bound is a bound as well."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.6g}"
    if (float(text) <= value) if down else (float(text) >= value):
        return text
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return f"{value - step if down else value + step:.6g}"
