"""The batch axis is not part of the map: where it is in each tensor, and what a graph gives for a batch."""

from typing import Any

import torch
from torch import Tensor

from opnorm.errors import UnsupportedLayerError
from opnorm.graph.types import Graph, Ref, Weight


class MixedSamplesError(UnsupportedLayerError):
    """An operation whose result for one sample depends on another one."""


def batch_place(node: torch.fx.Node, place: str, batch_sizes: set[Any]) -> tuple[int, int]:
    """The axis of a traced tensor that grows with the batch, and how many rows of a sample it holds.

    Args:
        node: the traced operation.
        place: where it is, for the message.
        batch_sizes: the symbols that stand for the size of the batch; others are sizes that a mask's values decide.

    Raises:
        MixedSamplesError: if no axis or several axes do.
    """
    shape = node.meta["val"].shape
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else None for n in shape]
    axes = [i for i, size in enumerate(sizes) if size is not None and size.free_symbols & batch_sizes]
    if len(axes) != 1:
        grows = "no axis grows" if not axes else f"{len(axes)} axes grow"
        raise MixedSamplesError(f"{place} mixes the samples of a batch: {grows} with the batch in its result")
    size: Any = sizes[axes[0]]
    symbols = list(size.free_symbols)
    factor = size.subs(symbols[0], 1)
    if len(symbols) != 1 or size != factor * symbols[0]:
        raise MixedSamplesError(f"{place} cuts the batch axis into pieces of size {size}")
    return axes[0], int(factor)


def varies_fastest(ids: Tensor, axis: int) -> bool | None:
    """Whether the batch is the inner part of a merged axis, from the number of the sample that each entry is from.

    None if it is neither the inner nor the outer part.
    """
    line = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
    count = len(line) // 2
    if bool((line[:count] == 0).all() and (line[count:] == 1).all()):
        return False
    if bool((line[0::2] == 0).all() and (line[1::2] == 1).all()):
        return True
    return None


def evaluate(graph: Graph, batches: tuple[Tensor, ...]) -> dict[str, Any]:
    """The result of every node for a batch."""
    values: dict[str, Any] = {}
    queue = list(batches)
    for node in graph.nodes:
        if node.op == "input":
            values[node.name] = queue.pop(0)
        else:
            args = filled(node.args, values, graph.weights)
            if _in_place(node.op):
                args = (args[0].clone(), *args[1:])  # so that what it writes into keeps its value
            kwargs = {k: filled(v, values, graph.weights) for k, v in node.kwargs.items()}
            values[node.name] = node.function(*args, **kwargs)
    return values


def _in_place(op: str) -> bool:
    """Whether an operation writes its result into its first argument."""
    name = op.split(".")[1:2]
    return bool(name) and name[0].endswith("_") and not name[0].endswith("__")


def filled(argument: Any, values: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """An argument with tensors in place of references."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, Weight):
        return weights[argument.name]
    if isinstance(argument, list | tuple):
        return type(argument)(filled(a, values, weights) for a in argument)
    return argument
