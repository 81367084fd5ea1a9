"""What a report looks like: nothing lost, nothing injected, ends rounded outward."""

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from opnorm import Enclosure
from opnorm.auditing import Report, Row, Skipped, Violation
from opnorm.render import SCHEMA, print_table, to_html, to_json
from opnorm.render.text import ceiling, floor, printable

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1); '",
    "</style><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "]]><svg onload=alert(1)>",
    "[red]markup[/red] [link=http://x]",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "line\nbreak\ttab\r",
    "&lt;b&gt;",
    "x" * 400,
]


def _row(name: str, lower: float = 1.0, upper: float = 2.0, role: str = "linear", note: str = "") -> Row:
    enclosure = Enclosure(lower, upper, "proved", "dense", 1e-6)
    return Row(name, (3, 4), "float32", role, 12, 0.5, enclosure, 2.5, 1.5, ("tied." + name,), note)


def _report(rows: list[Row], skipped: list[Skipped] = [], violations: list[Violation] = []) -> Report:  # noqa: B006
    return Report(
        "model.safetensors", "safetensors", "", "proved", 1e-6, 24, tuple(rows), tuple(skipped),
        ("upper>1",), tuple(violations), 0.5, {"opnorm": "0"},
    )  # fmt: skip


REPORTS = {
    "rows": _report([_row("a"), _row("b", 0.0, 5.0, "conv2d", "a note")]),
    "empty": _report([]),
    "only skipped": _report([], [Skipped("s", (2,), "float32", 2, 0.1, "vector", "a bias")]),
    "zero norm": _report([_row("z", 0.0, 0.0)]),
    "infinite end": _report([_row("i", 1.0, math.inf), _row("j")]),
    "extreme": _report([_row("i", 1e-300, 1e-299), _row("j", 1e299, 1e300)]),
    "one": _report([_row("one", 3.0, 3.0)], violations=[Violation("upper>1", "one", "upper = 3")]),
    "many roles": _report([_row(f"r{i}", 1.0, 1.0 + i, f"role{i}") for i in range(12)]),
    "hostile": _report(
        [_row(name, note=name) for name in HOSTILE],
        [Skipped(name, (2,), "float32", 2, 0.1, "nonfinite", name) for name in HOSTILE],
        [Violation("upper>1", name, name) for name in HOSTILE],
    ),
}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_whole_and_fetches_nothing(name: str) -> None:
    report = REPORTS[name]
    page = _parsed(to_html(report))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert tags.count("style") == 3 if report.rows else tags.count("style") == 1  # the page's and each plot's
    assert tags.count("svg") == (2 if report.rows else 0)
    assert not {"img", "iframe", "link", "object", "embed", "image"} & set(tags)
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        assert not [value for key, value in attributes.items() if key in {"src", "href"}]
        reference = attributes.get("xlink:href")
        assert reference is None or reference.startswith("#")
    text = "".join(page.words)
    for row in report.rows:
        assert printable(row.name) in text
        assert printable(row.aliases[0]) in text
    for item in report.skipped:
        assert printable(item.reason) in text


def test_the_page_follows_light_and_dark() -> None:
    html = to_html(REPORTS["rows"])
    assert "prefers-color-scheme: dark" in html
    plots = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    # Whatever colour is left fixed in a plot would be lost on one of the two papers.
    assert set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", plots)) <= {
        "none", "var(--ink)", "var(--faint)", "var(--alert)", "var(--role-0)", "var(--role-1)",
    }  # fmt: skip


def test_points_are_in_the_order_of_the_rows() -> None:
    html = to_html(REPORTS["many roles"])
    points = html[html.index('<g id="points">') :]
    points = (
        points[: points.index("</g>\n   </g>")]
        if "</g>\n   </g>" in points
        else points[: points.index("LineCollection")]
    )
    places = [float(x) for x in re.findall(r'<use[^>]* x="([0-9.]+)"', points)]
    assert len(places) == 12
    assert places == sorted(places)


@pytest.mark.parametrize("name", REPORTS)
def test_json_is_strict_and_complete(name: str) -> None:
    report = REPORTS[name]
    data = json.loads(to_json(report), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert data["schema"] == SCHEMA
    assert [row["name"] for row in data["rows"]] == [row.name for row in report.rows]
    assert [row["upper"] for row in data["rows"]] == [r.upper if math.isfinite(r.upper) else None for r in report.rows]
    assert [item["reason"] for item in data["skipped"]] == [item.reason for item in report.skipped]
    assert len(data["violations"]) == len(report.violations)


def _printed(report: Report, **options: object) -> str:
    stream = StringIO()
    print_table(report, Console(file=stream, **options))
    return stream.getvalue()


@pytest.mark.parametrize("name", REPORTS)
def test_a_table_in_a_pipe_is_never_cut(name: str) -> None:
    report = REPORTS[name]
    text = _printed(report, width=40)
    for row in report.rows:
        assert printable(row.name) in text
        assert ceiling(row.upper) in text
    for item in report.skipped:
        assert printable(item.name) in text
        assert printable(item.reason) in text
    assert "…" not in text
    assert "\x1b" not in text


def test_a_terminal_gets_folded_names_and_groups() -> None:
    skipped = [Skipped(f"b{i}", (2,), "float32", 2, 0.1, "vector", "a bias") for i in range(9)]
    text = _printed(_report([_row("a")], skipped), width=100, force_terminal=True, no_color=True)
    assert "b0, b1, b2 and 6 more" in text


def test_the_largest_rows_only() -> None:
    report = _report([_row(f"row{i}", 1.0, 2.0 + i) for i in range(5)])
    stream = StringIO()
    print_table(report, Console(file=stream), top=2)
    assert [name for name in ("row0", "row3", "row4") if f"{name} " in stream.getvalue()] == ["row3", "row4"]
    assert "3 more rows" in stream.getvalue()


@given(st.floats(min_value=0.0, allow_nan=False))
def test_printed_ends_are_rounded_outward(value: float) -> None:
    assert float(floor(value)) <= value <= float(ceiling(value))
    if 1e-300 < value < 1e300:
        assert float(ceiling(value)) - float(floor(value)) <= 2e-6 * value


@given(st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    assert printable(text).isprintable()
