"""`opnorm normalize`: divide every weight of a checkpoint by its norm, and certify it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opnorm.cli.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from opnorm.rewrite import Outcome

WIDE = 1_000_000


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), required=True, help="Where to write.")
@click.option("--lipschitz", metavar="K", type=float, default=1.0, show_default=True, help="The norm to divide to.")
@click.option(
    "--mode",
    type=click.Choice(["divide", "clip"]),
    default="divide",
    show_default=True,
    help="divide: every weight gets norm K; clip: only those above it.",
)
@click.option("--certificate", metavar="FILE", type=click.Path(path_type=Path), help="Default: OUT.certificate.json.")
@click.option("--only", metavar="PATTERN", multiple=True, help="Divide only these weights; the others are copied.")
@click.option("--skip", metavar="PATTERN", multiple=True, help="Copy these weights as they are.")
@click.option(
    "--role", "roles", metavar="PATTERN=ROLE", multiple=True, help="Read tensors as linear, conv, slices, skip."
)
@click.option("--part", default="", metavar="NAME", help="Part of a nested torch file to take, such as ema.")
def normalize(
    *,
    checkpoint: Path,
    output: Path,
    lipschitz: float,
    mode: str,
    certificate: Path | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    roles: tuple[str, ...],
    part: str,
) -> None:
    """Divide every matrix and convolution kernel in CHECKPOINT by its norm.

    OUT has the same format, names and dtypes. The norm of every divided weight is proved to be at most K for the
    values that are stored, after rounding to their dtype. The certificate lists the bounds and all that was copied;
    `opnorm verify` re-checks it.

    Convolution kernels are divided by the size-free norm: it holds for every input size, stride, dilation, grouping
    and zero padding, not for reflect or replicate padding. Biases, scales and statistics are copied: a network whose
    layers have norm 1 needs its biases scaled as well to decide as it did.
    """
    from rich.console import Console
    from rich.text import Text

    from opnorm.render.text import printable
    from opnorm.rewrite import normalize_checkpoint

    with progress_bar() as progress:
        outcome = normalize_checkpoint(
            checkpoint,
            output,
            lipschitz=lipschitz,
            mode=mode,  # type: ignore[arg-type]  # click has checked it
            certificate=certificate,
            only=only,
            skip=skip,
            roles=roles,
            part=part,
            progress=progress,
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    if outcome.changed:
        console.print(_changed(outcome, narrow=console.is_terminal))
    if outcome.kept or outcome.left:
        console.print("\ncopied as they are", style="italic")
        console.print(_copied(outcome))
        console.print()
    console.print(Text(printable(_summary(outcome)), style="bold"))
    click.echo(f"wrote {output} and {outcome.certificate_path}", err=True)
    click.echo(f"re-check it with: opnorm verify {outcome.certificate_path} --weights {output}", err=True)


def _changed(outcome: "Outcome", *, narrow: bool) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from opnorm.render.text import ceiling, printable, shaped

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold" if narrow else "ignore", no_wrap=not narrow)
    for heading in ("role", "shape", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("norm was", "norm is"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in outcome.changed:
        now = "0" if row.before.upper == 0 else f"<= {ceiling(row.bound)}"
        cells = [
            printable(" = ".join((row.name, *row.aliases))),
            row.role,
            shaped(row.shape),
            row.dtype,
            f"<= {ceiling(row.before.upper)}",
            now if row.action == "divided" else f"{now} (unchanged)",
        ]
        table.add_row(*map(Text, cells), style="dim" if row.action == "unchanged" else "")
    return table


def _copied(outcome: "Outcome") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from opnorm.render.text import printable

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("elements", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    table.add_column("such as", overflow="fold")
    reasons: dict[str, list[tuple[str, int, int]]] = {}
    for item in outcome.kept:
        reasons.setdefault(item.reason, []).append((item.name, 1, item.elements))
    for part in outcome.left:
        reasons.setdefault(part.reason, []).append((part.name, part.tensors, part.elements))
    for reason, items in reasons.items():
        counts = (f"{sum(item[1] for item in items):,}", f"{sum(item[2] for item in items):,}")
        table.add_row(*map(Text, (*counts, printable(reason), printable(items[0][0]))))
    return table


def _summary(outcome: "Outcome") -> str:
    from opnorm.render.text import ceiling

    divided = sum(row.action == "divided" for row in outcome.changed)
    unchanged = len(outcome.changed) - divided
    parts = [f"{divided} weight{'' if divided == 1 else 's'} divided"] + [f"{unchanged} unchanged"] * bool(unchanged)
    bound = ceiling(outcome.certificate.lipschitz)
    if outcome.changed:
        parts.append(f"each norm is at most {bound}, proved for what is stored")
    else:
        parts.append("nothing here is read as a matrix or a convolution kernel")
    return "; ".join(parts)
