"""Running a model on the `example_input` of a call."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from opnorm.errors import ArgumentError


def run_on(model: nn.Module, example_input: Any) -> Any:
    """Return what a model makes of one batch, of a tuple of its arguments, or of a mapping of its named ones.

    Raises:
        ArgumentError: if its `forward` does not take such arguments.
        TypeError: what the forward raises on arguments that it takes.
    """
    inputs: tuple[Any, ...] = example_input if isinstance(example_input, tuple) else (example_input,)
    named: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        inputs, named = (), dict(example_input)
    try:
        return model(*inputs, **named)
    except TypeError as error:
        takes = inspect.signature(model.forward)
        if _binds(takes, inputs, named):
            raise
        raise ArgumentError(
            f"example_input does not fit {type(model).__name__}.forward{takes}: {error}; it is one batch, the tuple of "
            "the arguments or a dict of the named ones (a dict that is itself an argument is in a tuple: (batch,))"
        ) from None


def _binds(takes: inspect.Signature, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    try:
        takes.bind(*inputs, **named)
    except TypeError:
        return False
    return True
