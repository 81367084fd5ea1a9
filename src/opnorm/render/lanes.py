"""The graph of a network beside its table: one small drawing for each row, as version histories are drawn.

A step that is read by the next one only lies on the first lane; what is read further down leaves on a lane of its own.
"""

from collections.abc import Mapping, Sequence

from opnorm.network import NodeBound

HEIGHT = 30
_STEP, _LEFT = 13, 11


def gutters(nodes: Sequence[NodeBound], colours: Mapping[str, int]) -> list[str]:
    """Return an SVG element for each node, whose lines meet those of the rows above and below.

    Args:
        nodes: in the order of computation.
        colours: the number of the page's colour for each kind of node.
    """
    last = _last_far_readers(nodes)
    lanes = _lanes(nodes, last)
    width = _LEFT * 2 + _STEP * max(lanes.values(), default=0)
    drawings = []
    for row, node in enumerate(nodes):
        parts = [_vertical(_LEFT, 0, HEIGHT / 2)] if row - 1 in node.sources else []
        if row + 1 < len(nodes) and row in nodes[row + 1].sources:
            parts.append(_vertical(_LEFT, HEIGHT / 2, HEIGHT))
        for source, lane in lanes.items():
            x, end = _LEFT + _STEP * lane, last[source]
            joins = source in node.sources and source != row - 1
            if source == row:
                parts.append(_curve(_LEFT, HEIGHT / 2, x, HEIGHT))
            elif source < row < end:
                parts.append(_vertical(x, 0, HEIGHT))
            if joins:
                parts.append(_curve(x, 0, _LEFT, HEIGHT / 2))
        dot = f'<circle cx="{_LEFT}" cy="{HEIGHT / 2}" r="5" fill="var(--role-{colours[node.kind]})"/>'
        lines = f'<g fill="none" stroke="var(--faint)" stroke-width="1.6">{"".join(parts)}</g>' if parts else ""
        drawings.append(
            f'<svg class="lane" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" aria-hidden="true">'
            f"{lines}{dot}</svg>"
        )
    return drawings


def _last_far_readers(nodes: Sequence[NodeBound]) -> dict[int, int]:
    """For each node that a row further down than the next one reads: the last such row."""
    return {source: row for row, node in enumerate(nodes) for source in node.sources if source != row - 1}


def _lanes(nodes: Sequence[NodeBound], last: Mapping[int, int]) -> dict[int, int]:
    """The lane of each such node: the first one that is free from its row to the last that reads it."""
    lanes: dict[int, int] = {}
    for source in sorted(last):
        taken = {lane for other, lane in lanes.items() if last[other] > source}
        lanes[source] = next(lane for lane in range(1, len(nodes) + 1) if lane not in taken)
    return lanes


def _vertical(x: float, top: float, bottom: float) -> str:
    return f'<path d="M{x:g} {top:g}V{bottom:g}"/>'


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (y + to_y) / 2
    return f'<path d="M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"/>'
