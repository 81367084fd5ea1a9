"""The estimate and the deployed weight as opaque operations, so that `torch.compile(fullgraph=True)` has one graph.

Whether a weight is new can only be told when the graph runs. The operations find their parametrization by a number,
as a graph cannot hold the object itself.
"""

import threading
from contextlib import AbstractContextManager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from opnorm.errors import ArgumentError, OpnormError
from opnorm.parametrize.blocks import Triple
from opnorm.parametrize.divided import divided_anywhere, division
from opnorm.parametrize.rule import Rule
from opnorm.parametrize.values import compute_dtype

_owners: "WeakValueDictionary[int, Rule]" = WeakValueDictionary()
_numbers = count()


def enrol(owner: Rule) -> int:
    """Return a number by which compiled graphs of this process find a parametrization."""
    number = next(_numbers)
    _owners[number] = owner
    return number


def _ordinary_keys() -> list[Any]:
    """The dispatch keys that are in force in a thread that has just begun."""
    found: list[Any] = []

    def read() -> None:
        found.extend([torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()])

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return found


def ordinary_dispatch() -> AbstractContextManager[None]:
    """Compute as outside a graph.

    A compiled graph runs its operations with lazy conjugation switched off: `x * y.conj()` silently loses the
    conjugation there (torch 2.13), and a proof would be one of something else.
    """
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(*_ORDINARY)
    return guard


_ORDINARY = _ordinary_keys()


def _owner(number: int) -> Rule:
    try:
        return _owners[number]
    except KeyError:
        raise OpnormError(
            "a compiled graph outlived the normalised layer it was made for; export opnorm.fold(model) instead, whose "
            "weights are plain"
        ) from None


@torch.library.custom_op("opnorm::triple", mutates_args=())
def triple(weight: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gain, left and right vectors of the training estimate, refreshed when the weight is new."""
    with ordinary_dispatch():
        found = _owner(number).triple(weight)
    right = weight.new_empty(0) if found.right is None else found.right.clone()
    return found.sigma.clone(), found.left.clone(), right


@triple.register_fake
def _(weight: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    view = _owner(number).view
    dtype = compute_dtype(weight)
    blocks, rows = view.blocks, weight.shape[view.axis] // view.blocks
    columns = weight.numel() // (blocks * rows)
    sigma = weight.new_empty(1 if view.joint else blocks, dtype=dtype.to_real())
    if view.sampled:
        return sigma, weight.new_empty(blocks, rows, columns, dtype=dtype), weight.new_empty(0)
    rank = 2 if view.frequencies and not weight.is_complex() else 1
    return (
        sigma,
        weight.new_empty(blocks, rows, rank, dtype=dtype),
        weight.new_empty(blocks, columns, rank, dtype=dtype),
    )


@torch.library.custom_op("opnorm::deployed", mutates_args=())
def deployed(weight: Tensor, number: int, scale: Tensor | None) -> Tensor:
    """The proved weight, computed when the raw one is new."""
    with ordinary_dispatch():
        return _owner(number).deployed(weight, scale).clone()


@deployed.register_fake
def _(weight: Tensor, number: int, scale: Tensor | None) -> Tensor:
    return torch.empty_like(weight)


def value(rule: Rule, weight: Tensor, number: int) -> Tensor:
    """Return what `layer.weight` is in a graph: the normalised weight, out of the operations above.

    Raises:
        ArgumentError: while a model is exported, whose graph would need this process.
    """
    if torch.compiler.is_exporting():
        raise ArgumentError(not_exported(rule))
    scale = rule.bound()
    stored: Tensor | None = None
    if not rule.training:
        stored = deployed(weight.detach(), number, None if scale is None else scale.detach())
        if stored is not None and not (torch.is_grad_enabled() and (weight.requires_grad or scale is not None)):
            return stored
    sigma, left, right = triple(weight.detach(), number)
    found = Triple(sigma, left, None if rule.view.sampled else right)
    return divided_anywhere(weight, division(rule, found), scale, stored)


def not_exported(rule: Rule) -> str:
    """Why a graph that leaves this process is refused."""
    return f"{rule.label} is normalised: export or trace opnorm.fold(model), whose weights are plain and proved"
