"""`opnorm bound`: the Lipschitz constant of a model in code, with a checkpoint's weights."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import nn

    from opnorm.network import NetworkBound

SCHEMA = 1


@click.command()
@click.argument("model", metavar="MODULE:FACTORY")
@click.option("--weights", metavar="PATH", type=click.Path(path_type=Path), help="A checkpoint for the model.")
@click.option("--input", "size", metavar="3x32x32", required=True, help="The shape of one sample.")
@click.option(
    "--method", default="auto", show_default=True, help="auto, naive, dense, fourier, fast, afp, adam, newton."
)
@click.option("--budget", type=float, metavar="SECONDS", help="Time for the search.")
@click.option("--json", "json_path", metavar="FILE", help="Write the bound as JSON; - for stdout.")
@click.option("--certificate", type=click.Path(path_type=Path), metavar="FILE", help="Write the certificate.")
def bound(
    *,
    model: str,
    weights: Path | None,
    size: str,
    method: str,
    budget: float | None,
    json_path: str | None,
    certificate: Path | None,
) -> None:
    """Bound the Lipschitz constant of the model that MODULE:FACTORY() returns.

    This imports MODULE and calls FACTORY: it runs the code that they hold.
    \f

    Raises:
        BadParameter: if the model or the shape cannot be read.
    """
    import torch

    import opnorm
    from opnorm.checkpoint import replacing

    click.echo(f"running the code of {model}", err=True)
    network = _built(model)
    if weights is not None:
        _load(network, weights)
    torch.manual_seed(0)
    found = opnorm.lipschitz(network.eval(), torch.randn(8, *_shape(size)), method=method, time_budget=budget)
    if json_path == "-":
        click.echo(json.dumps(_plain(found), indent=1))
    else:
        click.echo(str(found))
        if json_path is not None:
            with replacing(json_path) as beside:
                beside.write_text(json.dumps(_plain(found), indent=1))
    if certificate is not None:
        with replacing(certificate) as beside:
            found.certificate().save(beside)


def _built(name: str) -> "nn.Module":
    module, _, factory = name.partition(":")
    if not factory:
        raise click.BadParameter(f"{name!r} is not of the form MODULE:FACTORY")
    sys.path.insert(0, os.getcwd())
    try:
        made: nn.Module = getattr(import_module(module), factory)()
    except (ImportError, AttributeError) as problem:
        raise click.BadParameter(f"{name}: {problem}") from problem
    finally:
        sys.path.pop(0)
    return made


def _load(network: "nn.Module", path: Path) -> None:
    """Load a checkpoint's weights into the model, by name.

    Raises:
        CheckpointError: if the checkpoint lacks one, or holds one of another shape.
    """
    from opnorm.checkpoint import open_checkpoint
    from opnorm.errors import CheckpointError

    stored = {name: entry for entry in open_checkpoint(path).entries for name in (entry.name, *entry.aliases)}
    for name, tensor in network.state_dict().items():
        if name not in stored:
            if tensor.is_floating_point():
                raise CheckpointError(f"{path} has no weight {name!r}, which the model needs")
            continue
        if tuple(stored[name].shape) != tuple(tensor.shape):
            raise CheckpointError(f"{path}: {name!r} has shape {stored[name].shape}, the model's {tuple(tensor.shape)}")
        tensor.copy_(stored[name].load())


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise click.BadParameter(f"--input {text!r}: the shape of one sample, such as 3x32x32")
    return shape


def _plain(found: "NetworkBound") -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "upper": found.upper,
        "lower": found.lower,
        "product": found.product,
        "guarantee": found.guarantee,
        "method": found.method,
        "pairwise": None if found.pairwise is None else found.pairwise.tolist(),
        "remarks": list(found.remarks),
        "nodes": [vars(node) for node in found.nodes],
    }
