"""A value with its gradient as one opaque operation, so that `torch.compile(fullgraph=True)` keeps a step whole.

A graph cannot hold the object that computes: it finds it by a number.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from opnorm.errors import OpnormError
from opnorm.parametrize.compiled import ordinary_dispatch


class Differentiated(Protocol):
    """What computes a number of some weights."""

    def value_and_gradient(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The number, and its gradient in all weights, flattened, in float64 on the CPU."""


_owners: "WeakValueDictionary[int, Differentiated]" = WeakValueDictionary()
_numbers = count()


def enrol(owner: Differentiated) -> int:
    """Return a number by which graphs of this process find what computes."""
    number = next(_numbers)
    _owners[number] = owner
    return number


@torch.library.custom_op("opnorm::penalised", mutates_args=())
def penalised(weights: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """The estimate of a penalty and its gradient, as one operation of a graph."""
    if number not in _owners:
        raise OpnormError("a compiled graph outlived the LipschitzPenalty it was made for; compile it again")
    with ordinary_dispatch():
        value, gradient = _owners[number].value_and_gradient(weights)
    return value.to(weights[0].device, weights[0].dtype), gradient


@penalised.register_fake
def _(weights: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    size = sum(w.numel() for w in weights)
    return weights[0].new_empty(()), torch.empty(size, dtype=torch.float64, device="cpu")


def _remember(ctx: Any, inputs: tuple[list[Tensor], int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.like = [(w.shape, w.dtype, w.device) for w in inputs[0]]
    ctx.mark_non_differentiable(output[1])


def _pull(ctx: Any, outer: Tensor, _: Tensor) -> tuple[list[Tensor], None]:
    (gradient,) = ctx.saved_tensors
    parts = gradient.split([shape.numel() for shape, _, _ in ctx.like])
    pulled = [
        part.reshape(shape).to(device, dtype) * outer.to(device, dtype)
        for part, (shape, dtype, device) in zip(parts, ctx.like, strict=True)
    ]
    return pulled, None


penalised.register_autograd(_pull, setup_context=_remember)
