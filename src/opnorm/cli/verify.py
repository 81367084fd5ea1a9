"""`opnorm verify`: re-check a certificate against weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opnorm.cli.progress import progress_bar

if TYPE_CHECKING:
    from torch import nn

    from opnorm.certificate.network.check import Verified

EXIT_DOES_NOT_HOLD = 1
SHOWN = 8


@click.command()
@click.argument("certificate", type=click.Path(path_type=Path))
@click.option(
    "--weights", metavar="PATH", type=click.Path(path_type=Path), help="The checkpoint; by default those of --model."
)
@click.option("--part", default="", metavar="NAME", help="Part of a nested torch file to take, such as ema.")
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="Compare a network's certificate with the model too (runs its code).",
)
@click.option("--steps", is_flag=True, help="Print the steps that a network's certificate states.")
def verify(*, certificate: Path, weights: Path | None, part: str, model: str | None, steps: bool) -> None:
    """Prove again everything that CERTIFICATE claims of a checkpoint, or of the weights that a model holds.

    CERTIFICATE is one of weights, written by `opnorm normalize`, or one of a network, written by `opnorm bound`. The
    verifier forms its own products and factorises them; it shares no code with the search for the bounds but the
    lemma on Cholesky factorisations. What it cannot prove, it lists as taken on trust. A claim about a region of inputs
    says so.

    Exit codes: 0 it holds, 1 it does not hold for these weights, 2 a file could not be read.
    \f

    Raises:
        CertificateFormatError: if the certificate cannot be read.
        SystemExit: with 1, if it does not hold.
        UsageError: without weights and model.
    """
    from opnorm.certificate.network.check import Verified
    from opnorm.errors import CertificateError, CertificateFormatError
    from opnorm.render.text import ceiling, printable
    from opnorm.rewrite import verify as check

    of: nn.Module | Path
    if model is not None:
        from opnorm.cli.model import built, load

        of = network = built(model)
        if weights is not None:
            load(network, weights, part)
        else:
            click.echo(f"taking the weights that {model} returns, since there are no --weights", err=True)
    elif weights is not None:
        of = weights
    else:
        raise click.UsageError("give --weights PATH, or --model MODULE:FACTORY with its weights in it, or both")
    with progress_bar() as progress:
        try:
            found = check(certificate, of, part=part, progress=progress)
        except CertificateFormatError:
            raise
        except CertificateError as error:
            made = "" if weights is not None else f" (these weights are what {model} returns; --weights gives others)"
            click.echo(printable(f"does not hold: {error}{made}"))
            raise SystemExit(EXIT_DOES_NOT_HOLD) from error
    if isinstance(found, Verified):
        _print_network(found, steps=steps)
        return
    counted = "weight" if len(found.proved) == 1 else "weights"
    click.echo(
        f"holds: {len(found.proved)} {counted} proved to have norm at most {ceiling(found.lipschitz)}; "
        f"{len(found.untouched)} other tensors are those that were certified, with no claim on their norm"
    )


def _print_network(found: "Verified", *, steps: bool) -> None:
    from opnorm.render.text import ceiling, printable

    constant = f"the Lipschitz constant is at most {ceiling(found.upper)}"
    click.echo(
        f"holds: {constant}, proved for {len(found.steps)} steps with {len(found.read)} of "
        f"{len(found.read) + len(found.unread)} tensors"
    )
    if found.where:
        click.echo(printable(f"only for {found.where}"))
    if steps:
        for number, step in enumerate(found.steps):
            click.echo(printable(f"  step {number}: {step}"))
    for assumption in found.assumptions:
        click.echo(printable(f"taken on trust: {assumption}"))
    if found.unread:
        more = f" and {len(found.unread) - SHOWN} more" if len(found.unread) > SHOWN else ""
        click.echo(printable(f"plays no part: {', '.join(found.unread[:SHOWN])}{more}"), err=True)
