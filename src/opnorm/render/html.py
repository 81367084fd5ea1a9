"""A report as one self-contained HTML file: nothing is fetched, and names cannot inject."""

import math
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from opnorm.auditing import Report, Row
from opnorm.render.plots import distribution, per_layer, role_index
from opnorm.render.text import ceiling, floor, printable, shaped


def to_html(report: Report) -> str:
    """Return the page: verdict, plots, a sortable table, what was not measured and why, and how to read it."""
    broken = frozenset(violation.name for violation in report.violations)
    roles = list(dict.fromkeys(row.role for row in report.rows))
    bars = _bars(report.rows)
    # The plots hold no text of the file's, only our own.
    plots = (Markup(per_layer(report.rows, broken)), Markup(distribution(report.rows))) if report.rows else ()
    return template("report.html").render(
        report=report,
        title=PurePath(report.source).name or report.source,
        rows=[
            (row, role_index(roles, row.role), bar, row.name in broken)
            for row, bar in zip(report.rows, bars, strict=True)
        ],
        roles=[(role, role_index(roles, role), sum(row.role == role for row in report.rows)) for role in roles],
        notes=_notes(report),
        plots=plots,
        version=report.versions.get("opnorm", ""),
    )


def template(name: str) -> Template:
    """Return a template whose text cannot inject, with the filters that print numbers and names."""
    page = Environment(
        loader=PackageLoader("opnorm.render"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page.filters |= {
        "ceiling": ceiling,
        "floor": floor,
        "printable": printable,
        "shaped": shaped,
        "breakable": _breakable,
    }
    return page.get_template(name)


def _breakable(name: str) -> Markup:
    """Return a name that may be broken after its dots."""
    return Markup(".<wbr>").join(printable(name).split("."))


def _bars(rows: tuple[Row, ...]) -> list[float]:
    """Return the length of each row's bar in per cent, logarithmic between the smallest and the largest norm."""
    logs = [math.log(row.upper) if 0.0 < row.upper < math.inf else None for row in rows]
    known = [value for value in logs if value is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return [0.0 if value is None else 100.0 if span == 0.0 else 8.0 + 92.0 * (value - low) / span for value in logs]


def _notes(report: Report) -> list[tuple[str, str]]:
    """Return each note with the roles that it belongs to."""
    notes: dict[str, list[str]] = {}
    for row in report.rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.role)
    return [(", ".join(dict.fromkeys(roles)), note) for note, roles in notes.items()]
