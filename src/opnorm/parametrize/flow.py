"""What one run of a model tells: the input shape of every layer, how often it is called, and what it feeds."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from opnorm.parametrize.example import run_on
from opnorm.parametrize.families import TRANSPOSED, Shape
from opnorm.parametrize.fully_sharded import reshard
from opnorm.parametrize.spectral import SpectralNormalization


@dataclass
class Flow:
    """Recorded in one run: input shapes (None where they differ), calls, and who read each module's output."""

    shapes: dict[nn.Module, Shape | None] = field(default_factory=dict)
    readers: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)


def run_once(model: nn.Module, example_input: Any) -> Flow:
    """Run the model in evaluation mode, without gradients, and record shapes and readers. Nothing is left behind.

    Raises:
        ArgumentError: if the model does not take `example_input`.
    """
    flow = Flow()
    made: dict[int, tuple[Tensor, nn.Module]] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor)]
        if tensors:
            # A transposed convolution that is told its output's size may be another map at the next call.
            told = isinstance(module, TRANSPOSED) and len(inputs) + len(named) > 1
            shape = None if told else tuple(tensors[0].shape[1:])
            flow.shapes[module] = shape if flow.shapes.get(module, shape) == shape else None
        for x in tensors:
            if id(x) in made and made[id(x)][1] is not module:
                flow.readers.setdefault(made[id(x)][1], []).append(module)

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[id(output)] = (output, module)  # the tensor is kept, so that its id is not reused

    def count(module: nn.Module, _: Any) -> None:
        flow.calls.update([module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module])

    leaves = [
        module for module in model.modules() if not list(module.children()) or hasattr(module, "parametrizations")
    ]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in leaves]
    handles += [module.register_forward_hook(after) for module in leaves]
    handles += [module.register_forward_pre_hook(count) for module in model.modules()]
    try:
        with _evaluating(model), torch.no_grad():
            run_on(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)
    return flow


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all but normalised weights, which need no proof to tell shapes."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = isinstance(module, SpectralNormalization)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def sequence(model: nn.Module) -> Flow:
    """What the places of the layers and `nn.Sequential` say about calls and who feeds whom, without a run."""
    flow = Flow(calls=Counter(module for _, module in model.named_modules(remove_duplicate=False)))
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            flat = _flatten(parent)
            for module, reader in pairwise(flat):
                flow.readers[module] = [reader]
    return flow


def _flatten(parent: nn.Sequential) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in parent:
        found += (
            _flatten(child) if isinstance(child, nn.Sequential) else [] if isinstance(child, nn.Identity) else [child]
        )
    return found
