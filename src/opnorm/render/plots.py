"""The plots of an audit."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opnorm.auditing import Row
from opnorm.render.svg import ALERT, INK, ROLE, ROLE_COLOURS, drawable, plain_decades, svg


def role_index(roles: Sequence[str], role: str) -> int:
    """Return the number of the colour that a role has."""
    return min(roles.index(role), ROLE_COLOURS - 1)


def per_layer(rows: Sequence[Row], broken: frozenset[str]) -> str:
    """Draw the norm of every row over its place in the file; 1, which neither adds nor takes gain, is the base line.

    The points are one group with the id "points", in the order of `rows`.
    """
    roles = list(dict.fromkeys(row.role for row in rows))
    colours = [ROLE.format(role_index(roles, row.role)) for row in rows]
    places = list(range(1, len(rows) + 1))
    uppers, lowers = drawable([row.upper for row in rows]), drawable([row.lower for row in rows])

    def paint(axes: Axes) -> None:
        axes.axhline(1.0, color=INK, linewidth=0.9)
        axes.vlines(places, 1.0, uppers, colors=colours, linewidth=1.2, alpha=0.45)
        axes.vlines(places, lowers, uppers, colors=colours, linewidth=3.5)
        points = axes.scatter(places, uppers, c=colours, s=_size(len(rows)), linewidths=0, zorder=3)
        points.set_gid("points")
        marked = [(place, upper) for place, upper, row in zip(places, uppers, rows, strict=True) if row.name in broken]
        if marked:
            xs, ys = zip(*marked, strict=True)
            axes.scatter(xs, ys, s=90, facecolors="none", edgecolors=ALERT, linewidths=1.6, zorder=4)
        axes.set_yscale("log")
        plain_decades(axes.yaxis, max(*uppers, 1.0) / min(*lowers, 1.0))
        axes.set_xlim(0.0, len(rows) + 1.0)
        axes.set_xlabel("place in the file")
        axes.set_ylabel("operator norm")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")

    return svg(paint, "Operator norm of every measured weight, in the order of the file")


def distribution(rows: Sequence[Row]) -> str:
    """Draw how many rows have a norm of which size, by role."""
    roles = list(dict.fromkeys(row.role for row in rows))
    logs = [math.log10(upper) for upper in drawable([row.upper for row in rows])]
    low, high = min(logs), max(logs)
    if high - low < 1.0:
        low, high = (low + high) / 2 - 0.5, (low + high) / 2 + 0.5
    count = max(8, min(30, 2 * math.isqrt(len(rows)) + 4))
    edges = [10.0 ** (low + (high - low) * i / count) for i in range(count + 1)]
    # The ends stay inside after the detour over logarithms.
    edges[0], edges[-1] = edges[0] * 0.999, edges[-1] * 1.001
    groups = [
        [upper for upper, row in zip(drawable([r.upper for r in rows]), rows, strict=True) if row.role == role]
        for role in roles
    ]

    def paint(axes: Axes) -> None:
        colours = [ROLE.format(role_index(roles, role)) for role in roles]
        axes.hist(groups, bins=edges, stacked=True, color=colours, rwidth=0.9)
        axes.axvline(1.0, color=INK, linewidth=0.9) if edges[0] <= 1.0 <= edges[-1] else None
        axes.set_xscale("log")
        plain_decades(axes.xaxis, edges[-1] / edges[0])
        axes.set_xlabel("operator norm")
        axes.set_ylabel("weights")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")

    return svg(paint, "How many weights have an operator norm of which size")


def _size(count: int) -> float:
    return max(9.0, min(42.0, 1500.0 / max(1, count)))
