"""`opnorm verify`: re-check a certificate against weights."""

from pathlib import Path

import click

from opnorm.cli.progress import progress_bar

EXIT_DOES_NOT_HOLD = 1


@click.command()
@click.argument("certificate", type=click.Path(path_type=Path))
@click.option("--weights", metavar="PATH", type=click.Path(path_type=Path), required=True, help="The checkpoint.")
@click.option("--part", default="", metavar="NAME", help="Part of a nested torch file to take, such as ema.")
def verify(*, certificate: Path, weights: Path, part: str) -> None:
    """Prove again everything that CERTIFICATE claims of a checkpoint.

    The verifier forms its own products and factorises them; it shares no code with the search for the bounds but the
    lemma on Cholesky factorisations.

    Exit codes: 0 it holds, 1 it does not hold for these weights, 2 a file could not be read.
    \f

    Raises:
        CertificateFormatError: if the certificate cannot be read.
        SystemExit: with 1, if it does not hold.
    """
    from opnorm.errors import CertificateError, CertificateFormatError
    from opnorm.render.text import ceiling, printable
    from opnorm.rewrite import verify as check

    with progress_bar() as progress:
        try:
            found = check(certificate, weights, part=part, progress=progress)
        except CertificateFormatError:
            raise
        except CertificateError as error:
            click.echo(printable(f"does not hold: {error}"))
            raise SystemExit(EXIT_DOES_NOT_HOLD) from error
    counted = "weight" if len(found.proved) == 1 else "weights"
    click.echo(
        f"holds: {len(found.proved)} {counted} proved to have norm at most {ceiling(found.lipschitz)}; "
        f"{len(found.untouched)} other tensors are those that were certified, with no claim on their norm"
    )
