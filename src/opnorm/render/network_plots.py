"""The plots of a network's bound."""

import math

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opnorm.network import NetworkBound
from opnorm.render.svg import ACCENT, ALERT, FAINT, GOOD, INK, drawable, plain_decades, svg
from opnorm.render.text import ceiling, floor

_ROOM = 1.35
_DIGITS = 4


def sandwich(bound: NetworkBound) -> str:
    """Draw where the constant lies, between the lower and the upper bound, and how far off the product is."""
    lower, upper, product = drawable([bound.lower, bound.upper, bound.product])
    lower = lower if bound.lower > 0 else min(upper, product) / 100
    marks = [(upper, f"upper {ceiling(bound.upper, _DIGITS)}", ALERT, 0.78)]
    if bound.lower > 0:
        marks.append((lower, f"lower {floor(bound.lower, _DIGITS)}", GOOD, -0.78))
    if product > upper * (1 + 1e-6) and bound.product < math.inf:
        marks.append((product, f"product of the steps {ceiling(bound.product, _DIGITS)}", FAINT, -0.78))

    def paint(axes: Axes) -> None:
        axes.axhspan(-0.09, 0.09, color=FAINT, alpha=0.18, linewidth=0)
        axes.barh([0.0], [upper - lower], left=[lower], height=0.34, color=ACCENT, alpha=0.55)
        low, high = min(lower, 1.0 if lower > 0.2 else lower), max(product, upper)
        span = math.log(high / low) if high > low else 1.0
        low, high = low / math.exp(0.12 * span + 0.05), high * math.exp(0.12 * span + 0.05)
        for value, text, colour, place in marks:
            axes.plot([value, value], [0.0, place * 0.62], color=colour, linewidth=1.6, solid_capstyle="butt")
            share = math.log(value / low) / math.log(high / low)
            side = "left" if share < 0.3 else "right" if share > 0.7 else "center"
            axes.text(value, place, text, ha=side, va="center", color=INK)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(-1.1, 1.1)
        plain_decades(axes.xaxis, high / low)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("Lipschitz constant")

    return svg(paint, "The constant between its lower and its upper bound", (7.2, 2.5))


def waterfall(bound: NetworkBound) -> str:
    """Draw how the bound of the naive rules grows and shrinks from step to step, against what was proved."""
    heights = drawable([node.bound for node in bound.nodes])
    starts = [max((heights[i] for i in node.sources), default=1.0) for node in bound.nodes]
    places = list(range(1, len(heights) + 1))
    upper, lower = drawable([bound.upper, bound.lower or bound.upper])

    def paint(axes: Axes) -> None:
        for grows, colour in ((True, ALERT), (False, GOOD)):
            chosen = [i for i, (a, b) in enumerate(zip(starts, heights, strict=True)) if a != b and (b > a) is grows]
            bottoms = [min(starts[i], heights[i]) for i in chosen]
            sizes = [max(starts[i], heights[i]) - low for i, low in zip(chosen, bottoms, strict=True)]
            axes.bar([places[i] for i in chosen], sizes, bottom=bottoms, width=0.72, color=colour)
        for i, node in enumerate(bound.nodes):
            # What hands a bound on, and where each bar starts.
            axes.plot([i + 0.64, i + 1.36], [heights[i]] * 2, color=INK, linewidth=1.0)
            for source in node.sources:
                if source == i - 1:
                    axes.plot([i + 0.36, i + 0.64], [heights[source]] * 2, color=FAINT, linewidth=0.8)
        axes.axhspan(lower, upper, color=ACCENT, alpha=0.28, linewidth=0, zorder=0.5)
        axes.axhline(upper, color=ACCENT, linewidth=1.6)
        axes.set_yscale("log")
        shown = [*heights, lower, upper]
        axes.set_ylim(min(shown) / _ROOM, max(shown) * _ROOM)
        plain_decades(axes.yaxis, max(shown) / min(shown))
        axes.set_xlim(0.3, len(heights) + 0.7)
        axes.set_xlabel("step")
        axes.set_ylabel("bound so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")

    return svg(paint, "The bound of the naive rules, step by step")
