"""A report as tables for a terminal; in a pipe nothing is cut off."""

from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opnorm.auditing import Report, Row, Skipped
from opnorm.render.text import ceiling, floor, printable, shaped

_WIDE = 1_000_000
"""Columns when the output is no terminal: no name is that long."""

_SHOWN = 3
"""Names given of a group of like tensors on a terminal."""


def print_table(report: Report, console: Console, top: int | None = None) -> None:
    """Print what was measured, what was not and why, and the summary.

    Args:
        report: what to print.
        console: where to; only on a terminal are cells folded and like tensors grouped.
        top: print only so many rows, those with the largest norms; None prints all, in the order of the file.
    """
    if not console.is_terminal:
        console.width = _WIDE
    if report.taken:
        console.print(Text(f"taken: {printable(report.taken)}"))
    if report.rows:
        console.print(_measured(report, console, top))
    hidden = len(report.rows) - top if top is not None else 0
    if hidden > 0:
        console.print(Text(f"{hidden} more rows with smaller norms; leave --top out to see them"))
    if report.skipped:
        console.print(_skipped(report, console))
    for note in dict.fromkeys(row.note for row in report.rows if row.note):
        roles = ", ".join(dict.fromkeys(row.role for row in report.rows if row.note == note))
        console.print(Text(f"{roles}: {printable(note)}", style="dim"))
    console.print(Text(printable(report.summary), style="bold"))


def _grid(console: Console, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold" if console.is_terminal else "ignore", no_wrap=not console.is_terminal)
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    return table


def _measured(report: Report, console: Console, top: int | None) -> Table:
    broken = {violation.name for violation in report.violations}
    table = _grid(console, "")
    table.add_column("role", no_wrap=True)
    for heading in ("norm from", "to", "gap", "Frobenius", "stable rank", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("guarantee", no_wrap=True)
    for row in _largest(report.rows, top):
        cells = [
            printable(" = ".join((row.name, *row.aliases))),
            shaped(row.shape),
            row.dtype,
            row.role,
            floor(row.lower),
            ceiling(row.upper),
            f"{row.gap:.1e}",
            f"{row.frobenius:.5g}",
            f"{row.stable_rank:.4g}",
            f"{row.share:.2%}",
            row.enclosure.guarantee,
        ]
        table.add_row(*map(Text, cells), style="red" if row.name in broken else "")
    return table


def _largest(rows: tuple[Row, ...], top: int | None) -> list[Row]:
    return list(rows) if top is None else sorted(rows, key=lambda row: -row.upper)[:top]


def _skipped(report: Report, console: Console) -> Table:
    table = _grid(console, "\nnot measured")
    table.add_column("elements", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold" if console.is_terminal else "ignore", no_wrap=not console.is_terminal)
    for name, item, elements in _grouped(report.skipped, together=console.is_terminal):
        cells = [printable(name), shaped(item.shape), item.dtype, f"{elements:,}", printable(item.reason)]
        table.add_row(*map(Text, cells), style="red" if item.kind in {"nonfinite", "failed"} else "")
    return table


def _grouped(skipped: tuple[Skipped, ...], *, together: bool) -> list[tuple[str, Skipped, int]]:
    """Join the vectors of one reason into one line each, where they are to be together."""
    if not together:
        return [(item.name, item, item.elements) for item in skipped]
    vectors = sorted((item for item in skipped if item.kind == "vector"), key=lambda item: item.reason)
    lines = [(item.name, item, item.elements) for item in skipped if item.kind != "vector"]
    for _, group in groupby(vectors, key=lambda item: item.reason):
        items = list(group)
        more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        names = ", ".join(item.name for item in items[:_SHOWN]) + more
        one = items[0] if len(items) == 1 else Skipped("", (), "", 0, 0.0, "vector", items[0].reason)
        lines.append((names, one, sum(item.elements for item in items)))
    return lines
