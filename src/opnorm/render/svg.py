"""A picture as inline SVG whose colours are CSS variables of the page, so that it follows light and dark."""

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

Painter = Callable[[Axes], None]

INK, FAINT, ALERT = "#010101", "#020202", "#030303"
ROLE = "#0404{:02x}"
"""Colour of a number: format it."""

ROLE_COLOURS = 8
"""Number of numbered colours in the page's style; what is above shares the last one."""

_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", ALERT: "var(--alert)"}

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


def svg(paint: Painter, title: str) -> str:
    """Return what `paint` draws, named by `title`."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
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


def plain_decades(axis: Axis, span: float) -> None:
    """Label a logarithmic axis with plain numbers, and with more of them where it spans little."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < _SMALL_SPAN else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
