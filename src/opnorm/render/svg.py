"""Inline SVG whose colours are CSS variables of the page, so that plots follow light and dark."""

import math
import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

Painter = Callable[[Axes], None]

INK, FAINT, ALERT, GOOD, ACCENT = "#010101", "#020202", "#030303", "#050505", "#060606"
ROLE = "#0404{:02x}"
"""Colour of a number: format it."""

ROLE_COLOURS = 8
"""Number of numbered colours in the page's style; what is above shares the last one."""

_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    ALERT: "var(--alert)",
    GOOD: "var(--good)",
    ACCENT: "var(--accent)",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opnorm",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
}
_SMALL_SPAN = 300.0
_EXTREME = 1e100
_LEAST = 1e-12
"""Where zero norms are drawn, relative to the largest: a logarithm has no place for them."""


def plain_decades(axis: Axis, span: float) -> None:
    """Label a logarithmic axis with plain numbers, and with more of them where it spans little."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < _SMALL_SPAN else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def drawable(values: Sequence[float]) -> list[float]:
    """Move what a logarithmic axis cannot show to its edge: zeros, infinities, and what it would overflow on."""
    finite = [value for value in values if 0.0 < value < math.inf]
    top = min(max(finite, default=1.0), _EXTREME)
    least = max(top * _LEAST, 1.0 / _EXTREME)
    return [min(max(value, least), max(top, least)) for value in values]


def svg(paint: Painter, title: str, size: tuple[float, float] = (7.2, 3.3)) -> str:
    """Draw one pair of axes and return it as an SVG element."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        axes.minorticks_off()
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    return _themed(buffer.getvalue(), title)


def _themed(text: str, title: str) -> str:
    """Cut the XML head, name the picture for screen readers, and put the page's colours in the place of ours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{title}"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"#0404([0-9a-f]{2})", lambda match: f"var(--role-{int(match[1], 16)})", text)
