"""`opnorm bound`: the Lipschitz constant of a model in code, with a checkpoint's weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opnorm.cli.progress import progress_bar

if TYPE_CHECKING:
    from opnorm.certificate.network.region import Region

EXIT_VIOLATED = 1
FIELDS = ("upper", "lower", "product", "gap")
METHODS = ("auto", "naive", "rescaled", "dense", "fourier", "fast", "sweep", "afp", "adam", "newton")


@click.command()
@click.argument("model", metavar="MODULE:FACTORY")
@click.option("--weights", metavar="PATH", type=click.Path(path_type=Path), help="A checkpoint for the model.")
@click.option("--part", default="", metavar="NAME", help="Part of a nested torch file to take, such as ema.")
@click.option("--input", "size", metavar="3x32x32", required=True, help="The shape of one sample.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="How, or how far.")
@click.option(
    "--time-budget", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Time for the search."
)
@click.option("--ball", type=float, metavar="EPS", help="Only for inputs within EPS of the sample of --center.")
@click.option("--center", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint that holds one tensor.")
@click.option("--box", type=(float, float), metavar="LO HI", help="Only for inputs whose elements are in between.")
@click.option("--norm-ball", type=float, metavar="RADIUS", help="Only for inputs of at most this norm.")
@click.option("--json", "json_to", metavar="FILE", help="Write the bound as JSON; - for stdout, without the table.")
@click.option("--html", "html_to", metavar="FILE", help="Write the bound as one self-contained HTML file.")
@click.option("--certificate", metavar="FILE", help="Write the certificate, for `opnorm verify`.")
@click.option("--fail-on", metavar="RULE", multiple=True, help='Exit with 1 where the bound fulfils it: "upper>10".')
def bound(
    *,
    model: str,
    weights: Path | None,
    part: str,
    size: str,
    method: str,
    time_budget: float | None,
    ball: float | None,
    center: Path | None,
    box: tuple[float, float] | None,
    norm_ball: float | None,
    json_to: str | None,
    html_to: str | None,
    certificate: str | None,
    fail_on: tuple[str, ...],
) -> None:
    """Bound the Lipschitz constant of the model that MODULE:FACTORY() returns.

    This imports MODULE and calls FACTORY: it runs the code that they hold. The model is taken in evaluation mode.

    Rules compare upper, lower, product or gap with a number, by < <= > >= == or !=.
    """
    import torch

    import opnorm
    from opnorm import auditing, render
    from opnorm.checkpoint import replacing
    from opnorm.cli.audit import check_writable
    from opnorm.cli.model import built, load

    for target in (json_to, html_to, certificate):
        check_writable(target)
    shape = _shape(size)
    rules = [auditing.parse(text, FIELDS) for text in fail_on]
    region = _region(shape, ball=ball, center=center, box=box, norm_ball=norm_ball)
    network = built(model)
    if weights is not None:
        load(network, weights, part)
    torch.manual_seed(0)
    first = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())
    example = torch.randn(8, *shape, dtype=first)
    with progress_bar() as progress:
        found = opnorm.lipschitz(
            network, example, method=method, region=region, time_budget=time_budget, progress=progress
        )
    proof = None if certificate is None else found.certificate()
    makers = ((json_to, render.bound_json), (html_to, render.bound_html))
    texts = {target: make(found, model) for target, make in makers if target is not None}
    # Only what is complete is written; the table is written line by line, since names in it must not steer a terminal.
    click.echo(texts.pop("-", None) or "\n".join(map(render.text.printable, str(found).splitlines())))
    for target, text in texts.items():
        with replacing(target) as path:
            path.write_text(text, encoding="utf-8")
        click.echo(f"wrote {target}", err=True)
    if proof is not None and certificate is not None:
        with replacing(certificate) as path:
            proof.save(path)
        click.echo(f"wrote {certificate}", err=True)
        checked = "" if weights is None else f" --weights {weights}"
        click.echo(f"re-check it with: opnorm verify {certificate}{checked} --model {model}", err=True)
    broken = [rule for rule in rules if rule.broken_by(found)]
    for rule in broken:
        click.echo(f"violated: {rule.text}: {rule.field} = {getattr(found, rule.field):.6g}", err=True)
    click.get_current_context().exit(EXIT_VIOLATED if broken else 0)


def _region(
    shape: tuple[int, ...],
    *,
    ball: float | None,
    center: Path | None,
    box: tuple[float, float] | None,
    norm_ball: float | None,
) -> "Region | None":
    import torch

    from opnorm.checkpoint import stored_tensors
    from opnorm.network import Ball, Box, NormBall

    if sum(option is not None for option in (ball, box, norm_ball)) > 1:
        raise click.UsageError("--ball, --box and --norm-ball are one region: give one of them")
    if (ball is None) != (center is None):
        raise click.UsageError("--ball and --center go together")
    if box is not None:
        return Box(torch.full(shape, box[0]), torch.full(shape, box[1]))
    if norm_ball is not None:
        return NormBall(norm_ball)
    if ball is None or center is None:
        return None
    held = list(stored_tensors(center).values())
    if len(held) != 1:
        raise click.UsageError(f"--center {center}: holds {len(held)} tensors, not one")
    return Ball(held[0], ball)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise click.BadParameter(f"--input {text!r}: the shape of one sample, such as 3x32x32")
    return shape
