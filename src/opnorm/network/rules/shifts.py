"""What is added to a linear operation: it cancels in differences, and is stated where values matter, on a region."""

from itertools import combinations_with_replacement
from math import prod
from typing import Any

import torch
from torch import Tensor

from opnorm.certificate.network.program import Shift
from opnorm.graph import Node, Weight
from opnorm.network.rules.registry import Builder, label


def shifted(
    node: Node, build: Builder, position: int, added: Any, *, axis: int | None = None, coefficient: float = 1.0
) -> int:
    """The position of a step with a stored tensor or a number added to it; itself where shifts are not stated.

    Args:
        node: the operation, whose shape the sum has.
        build: the program.
        position: of the step.
        added: a weight, a number or None.
        axis: of the batched result, along which a vector of weights lies; by default they are broadcast.
        coefficient: of what is added.
    """
    if not build.shifts or added is None:
        return position
    if isinstance(added, int | float):
        if added == 0:
            return position
        name = build.constant(torch.tensor([float(added)], dtype=torch.float64), "number")
        return build.add(
            Shift((position,), node.sample_shape, label(node), name, 1, prod(node.sample_shape), coefficient)
        )
    if not isinstance(added, Weight):
        return build.unknown(node, position)
    weight = build.tensor(added)
    if axis is not None:
        weight = weight.reshape([-1 if i == axis else 1 for i in range(len(node.shape))])
    both = node.samples(weight.expand(node.shape))
    if not torch.equal(both[0], both[1]):
        return build.unknown(node, position)
    name, where = added.name, _layout(weight.reshape(-1), both[0])
    if where is None:
        name, where = build.constant(both[0].reshape(-1).contiguous(), f"{name} spread"), (1, 1)
    return build.add(Shift((position,), node.sample_shape, label(node), name, *where, coefficient))


def _layout(flat: Tensor, spread: Tensor) -> tuple[int, int] | None:
    """Sizes before and after the axis of the flattened sample along which a tensor lies; None where there is none."""
    shape, size = spread.shape, flat.numel()
    for first, last in combinations_with_replacement(range(len(shape) + 1), 2):
        before, after = prod(shape[:first]), prod(shape[last:])
        fits = before * size * after == spread.numel()
        if fits and torch.equal(flat.reshape(1, -1, 1).expand(before, -1, after).reshape(-1), spread.reshape(-1)):
            return before, after
    return None
