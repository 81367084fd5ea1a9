"""A network's bound as JSON, and as one self-contained HTML file."""

import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from opnorm._version import __version__
from opnorm.network import NetworkBound, NodeBound
from opnorm.render.html import template
from opnorm.render.json import finite
from opnorm.render.lanes import gutters
from opnorm.render.network_plots import sandwich, waterfall

BOUND_SCHEMA = "opnorm.bound/1"
"""Changes when a field is removed or changes its meaning; added fields do not change it."""

COLOURS = {"linear": 0, "activation": 2, "opaque": 1, "join": 3, "input": 7}
MEANING = {
    "input": "input",
    "linear": "linear map, norm proved",
    "activation": "activation, slopes known",
    "opaque": "constant known, nothing else",
    "join": "sum or concatenation",
}


def bound_json(bound: NetworkBound, source: str) -> str:
    """Return the bound as indented JSON text; what is not finite is null."""
    plain = {
        "schema": BOUND_SCHEMA,
        "source": source,
        "upper": bound.upper,
        "lower": bound.lower,
        "product": bound.product,
        "gap": bound.gap,
        "guarantee": bound.guarantee,
        "method": bound.method,
        "pairwise": None if bound.pairwise is None else bound.pairwise.tolist(),
        "remarks": list(bound.remarks),
        "nodes": [{**vars(node), "shape": list(node.shape), "sources": list(node.sources)} for node in bound.nodes],
        "versions": {"opnorm": __version__},
    }
    return json.dumps(finite(plain), indent=2, allow_nan=False) + "\n"


def bound_html(bound: NetworkBound, source: str) -> str:
    """Return the page: the sandwich, the waterfall of the product, the graph with each step's constant."""
    used = {node.kind for node in bound.nodes}
    # The drawings hold no text of the model's, only our own.
    drawn = 0 < bound.upper < math.inf
    plots = (Markup(sandwich(bound)), Markup(waterfall(bound))) if drawn else ()
    lanes = map(Markup, gutters(bound.nodes, COLOURS))
    return template("bound.html").render(
        bound=bound,
        title=source,
        rows=list(zip(bound.nodes, lanes, _changes(bound.nodes), strict=True)),
        legend=[(MEANING[kind], colour) for kind, colour in COLOURS.items() if kind in used],
        plots=plots,
        why=any(node.note for node in bound.nodes),
        unbounded=next((node for node in bound.nodes if math.isinf(node.constant)), None),
        version=__version__,
        below=bound.product / bound.upper if 0 < bound.upper < math.inf and bound.product < math.inf else 1.0,
    )


def _changes(nodes: Sequence[NodeBound]) -> list[dict[str, Any]]:
    """How each step changes the running bound, for its bar: the longest is half of the column."""
    finite_ones = [node.contribution for node in nodes if 0 < node.contribution < math.inf]
    longest = max(math.log10(2.0), *(abs(math.log10(value)) for value in finite_ones))
    bars = []
    for node in nodes:
        drawn = 0 < node.contribution < math.inf
        width = 50.0 * abs(math.log10(node.contribution)) / longest if drawn else 50.0
        bars.append({"grows": node.contribution > 1.0, "width": width})
    return bars
