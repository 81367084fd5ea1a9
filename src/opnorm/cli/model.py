"""A model in code: MODULE:FACTORY, called, with the weights of a checkpoint."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import nn


def built(name: str) -> "nn.Module":
    """What MODULE:FACTORY() returns, in evaluation mode; this runs the code that they hold.

    Raises:
        ArgumentError: if it cannot be imported or called, or returns no module.
    """
    from torch import nn

    from opnorm.errors import ArgumentError

    module, _, factory = name.partition(":")
    if not module or not factory:
        raise ArgumentError(f"{name!r} is not of the form MODULE:FACTORY")
    click.echo(f"running the code of {name}", err=True)
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(import_module(module), factory)()
    except (Exception, SystemExit) as problem:  # whatever their code raises
        raise ArgumentError(f"{name}: {type(problem).__name__}: {problem}") from problem
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"{name} returned {type(made).__name__}, not a torch.nn.Module")
    return made.eval()


def load(network: "nn.Module", path: Path, part: str = "") -> None:
    """Load a checkpoint's weights into the model, by name.

    Raises:
        CheckpointError: if the checkpoint lacks one, or holds one of another shape, or none of the model's.
    """
    import torch

    from opnorm.checkpoint import stored_tensors
    from opnorm.errors import CheckpointError

    stored = stored_tensors(path, part)
    state = network.state_dict()
    for name, tensor in state.items():
        if name not in stored:
            if tensor.is_floating_point():
                raise CheckpointError(f"{path} has no weight {name!r}, which the model needs")
            continue
        value = stored[name]
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(value.shape)}, the model's has {tuple(tensor.shape)}"
            )
        if value.dtype != tensor.dtype and not torch.can_cast(value.dtype, tensor.dtype):
            raise CheckpointError(f"{path}: {name!r} is of {value.dtype}, the model's of {tensor.dtype}")
        if not torch.allclose(value.to(tensor.dtype).to(value.dtype), value, rtol=0.0, atol=0.0, equal_nan=True):
            raise CheckpointError(
                f"{path}: {name!r} is of {value.dtype}, and the model's {tensor.dtype} would round it; "
                "let the factory return a model of the file's dtype"
            )
        with torch.no_grad():
            tensor.copy_(value)
