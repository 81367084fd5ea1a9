"""`opnorm audit`: measure the norm of every weight in a checkpoint."""

from pathlib import Path

import click

from opnorm.cli.progress import progress_bar

EXIT_VIOLATED = 1


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "json_to", metavar="FILE", help="Write the report as JSON; - for stdout, without the table.")
@click.option("--html", "html_to", metavar="FILE", help="Write the report as one self-contained HTML file.")
@click.option("--fail-on", metavar="RULE", multiple=True, help='Exit with 1 where a weight fulfils it: "upper>10".')
@click.option(
    "--guarantee",
    type=click.Choice(["proved", "probable", "estimate"]),
    default="proved",
    show_default=True,
    help="What every upper end must hold.",
)
@click.option("--rtol", type=float, help="Target for upper / lower - 1.  [default: 1e-4; 1e-3 where probable]")
@click.option(
    "--role", "roles", metavar="PATTERN=ROLE", multiple=True, help="Read tensors as linear, conv, slices, skip."
)
@click.option("--part", default="", metavar="NAME", help="Part of a nested torch file to take, such as ema.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Print only the N largest norms.")
def audit(
    checkpoint: Path,
    *,
    json_to: str | None,
    html_to: str | None,
    fail_on: tuple[str, ...],
    guarantee: str,
    rtol: float | None,
    roles: tuple[str, ...],
    part: str,
    top: int | None,
) -> None:
    """Enclose the operator norm of every weight in CHECKPOINT.

    CHECKPOINT is a safetensors file, a Hugging Face folder or index, or a file of torch.save. No code in it is run.

    Rules compare upper, lower, gap, frobenius, stable_rank, share or elements with a number, by < <= > >= == or !=.
    """
    from rich.console import Console

    from opnorm import auditing, render
    from opnorm.checkpoint import replacing

    for target in (json_to, html_to):
        check_writable(target)
    with progress_bar() as progress:
        report = auditing.audit(
            checkpoint,
            guarantee=guarantee,  # type: ignore[arg-type]  # click has checked it
            rtol=rtol,
            fail_on=fail_on,
            roles=roles,
            part=part,
            progress=progress,
        )
    if json_to == "-":
        click.echo(render.to_json(report), nl=False)
        click.echo(render.text.printable(report.summary), err=True)
    else:
        render.print_table(report, Console(highlight=False), top)
    for target, make in ((json_to, render.to_json), (html_to, render.to_html)):
        if target not in (None, "-"):
            with replacing(str(target)) as path:
                path.write_text(make(report), encoding="utf-8")
            click.echo(f"wrote {target}", err=True)
    for violation in report.violations:
        line = f"violated: {violation.rule}: {violation.name}: {violation.reason}"
        click.echo(render.text.printable(line), err=True)
    click.get_current_context().exit(0 if report.ok else EXIT_VIOLATED)


def check_writable(target: str | None) -> None:
    """Refuse a file that cannot be written before the work is done, not after."""
    if target not in (None, "-") and not Path(str(target)).absolute().parent.is_dir():
        raise click.UsageError(f"cannot write {target}: there is no such folder")
