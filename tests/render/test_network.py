"""What a network's bound looks like: nothing injected, nothing fetched, the graph's lines meet, ends outward."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from opnorm.network import NetworkBound, NodeBound
from opnorm.network.table import table_of
from opnorm.render import bound_html, bound_json
from opnorm.render.lanes import HEIGHT, gutters
from opnorm.render.network import COLOURS
from opnorm.render.text import printable

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "\x1b[2J", "]]><svg onload=x>"]


def node(
    place: str, kind: str = "linear", sources: tuple[int, ...] = (), value: float = 1.0, so_far: float = 1.0
) -> NodeBound:
    return NodeBound(place, kind, (3, 4), sources, value, value, so_far, f"why {place}")


def network(*nodes: NodeBound, upper: float = 2.0, lower: float = 1.0, product: float = 4.0) -> NetworkBound:
    def none() -> None:
        raise AssertionError("rendering asks for no certificate")

    pairs = torch.ones(2, 2, dtype=torch.float64)
    return NetworkBound(
        upper, lower, product, pairs, nodes, "proved", "dense fast", None, ("a remark <b>",), none  # type: ignore[arg-type]
    )  # fmt: skip


CHAIN = (node("x", "input"), node("0: linear", "linear", (0,), 2.0, 2.0), node("1: relu", "activation", (1,), 1.0, 2.0))
SKIP = (*CHAIN, node("2: linear", "linear", (2,), 0.5, 1.0), node("add", "join", (3, 1), 1.0, 3.0))
BOUNDS = {
    "chain": network(*CHAIN),
    "skip": network(*SKIP),
    "zero": network(*CHAIN, upper=0.0, lower=0.0, product=0.0),
    "no lower": network(*CHAIN, lower=0.0),
    "infinite": network(*CHAIN, node("exp", "opaque", (2,), math.inf, math.inf), upper=math.inf, product=math.inf),
    "tight": network(*CHAIN, upper=1.0, lower=1.0, product=1.0),
    "extreme": network(
        node("x", "input"), node("w", "linear", (0,), 1e300, 1e300), upper=1e300, lower=1e-300, product=1e300
    ),
    "hostile": network(node("x", "input"), *(node(name, "opaque", (i,)) for i, name in enumerate(HOSTILE))),
    "long": network(*(node(f"step {i}", "linear", (i - 1,) if i else ()) for i in range(300))),
}  # fmt: skip


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_page_is_whole_and_fetches_nothing(name: str) -> None:
    bound = BOUNDS[name]
    page = Page()
    page.feed(bound_html(bound, HOSTILE[0]))
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "img", "iframe", "link", "object", "embed", "image"} & set(tags)
    assert tags.count("svg") == len(bound.nodes) + (2 if 0 < bound.upper < math.inf else 0)
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        assert not {"src", "href"} & attributes.keys()
        reference = attributes.get("xlink:href")
        assert reference is None or reference.startswith("#")
    text = "".join(page.words)
    assert "a remark <b>" in text
    assert all(printable(n.place) in text and printable(n.note) in text for n in bound.nodes)
    assert ("No finite bound" in text) is (name == "infinite")


def test_the_page_follows_light_and_dark() -> None:
    html = bound_html(BOUNDS["skip"], "x")
    assert "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    colours = set(re.findall(r"(?:fill|stroke)(?:: ?|=\")([^;\"]+)", drawings))
    assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none"}


def ends(drawing: str, side: float) -> set[float]:
    """Where lines reach the upper or the lower edge of a row."""
    found = set()
    for path in re.findall(r'd="([^"]+)"', drawing):
        numbers = [float(n) for n in re.findall(r"[\d.]+", path)]
        start, end = numbers[:2], (numbers[0], numbers[2]) if "V" in path else numbers[-2:]
        found |= {x for x, y in (start, end) if y == side}
    return found


GRAPHS = {name: BOUNDS[name].nodes for name in ("chain", "skip", "long")} | {
    "two heads": (*CHAIN, node("a", sources=(1,)), node("b", sources=(1,)), node("c", "join", (3, 4, 0))),
    "crossing": (*CHAIN, node("a", sources=(0,)), node("b", sources=(1,)), node("c", "join", (2, 3, 4))),
    "late input": (node("x", "input"), node("y", "input"), node("a", sources=(0,)), node("b", "join", (1, 2))),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_lines_of_the_graph_meet_and_end_at_steps(name: str) -> None:
    nodes = GRAPHS[name]
    drawings = gutters(nodes, COLOURS)
    for above, below in pairwise(drawings):
        assert ends(above, HEIGHT) == ends(below, 0)
    assert not ends(drawings[0], 0)
    assert not ends(drawings[-1], HEIGHT)
    # As many lines come down to each step as it has sources.
    for row, drawing in enumerate(drawings):
        arriving = len(re.findall(rf'd="M[\d.]+ 0(?:V{HEIGHT / 2:g}"|C[^"]* {HEIGHT / 2:g}")', drawing))
        assert arriving == len(set(nodes[row].sources))


@pytest.mark.parametrize("name", BOUNDS)
def test_json_is_strict_and_complete(name: str) -> None:
    bound = BOUNDS[name]
    data = json.loads(bound_json(bound, "x"), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert (data["schema"], data["source"]) == ("opnorm.bound/1", "x")
    assert [n["place"] for n in data["nodes"]] == [n.place for n in bound.nodes]
    assert data["upper"] == (bound.upper if math.isfinite(bound.upper) else None)


def test_the_table_follows_the_modules() -> None:
    places = ["x", "stem: conv2d", "block.a: linear", "block.act: relu", "block: add", "head: linear"]
    bound = network(*(node(p, sources=(i - 1,) if i else ()) for i, p in enumerate(places)))
    lines = [line.split("  3x4")[0].rstrip() for line in table_of(bound).splitlines()[2:9]]
    assert lines == ["x", "stem: conv2d", "block", "  a: linear", "  act: relu", "  add", "head: linear"]


def test_the_table_says_what_is_read_from_further_up() -> None:
    assert "reads 0: linear" in table_of(BOUNDS["skip"])


def test_printed_bounds_are_outward() -> None:
    text = table_of(network(*CHAIN, lower=1.00000099, upper=1.00000101))
    assert "1 <= Lipschitz constant <= 1.00001" in text
