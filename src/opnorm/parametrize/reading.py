"""How a layer reads its normalised weight: past torch's parametrization, whose steps cost more than a small product."""

import sys
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from opnorm.parametrize.lazy import NormalizedWeight
from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.watched import Record, Watched

_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = frozenset(id(layer.forward.__code__) for layer in _READERS)
"""Code that hands the weight to one operation and does nothing else with it."""

_FEW = 3
"""Entries that are looked at although writes are noticed: what NumPy and compiled fused steps write is not."""


@dataclass(slots=True, eq=False)
class Ready:
    """A deployed weight, and all there is to look at before it is used again."""

    layer: "ref[nn.Module]"
    parameters: dict[str, Any]
    raw: Watched
    record: Record
    token: object
    version: int
    lent: int
    place: int
    picked: Tensor
    sample: list[float]
    value: Tensor


def read_directly(module: nn.Module, name: str) -> None:
    """Replace torch's property on the layer's own class, which its copies share, by one that comes to the same."""
    known: Any = getattr(type(module), name)
    rules: dict[int, ref[SpectralNormalization]] = {}

    def read(module: nn.Module) -> Tensor:
        if is_dynamo_compiling():
            return known.fget(module)  # type: ignore[no-any-return]
        plainly = id(sys._getframe(1).f_code) in _FORWARDS
        found = rules.get(id(module))
        if plainly and found is not None:
            ready = getattr(found(), "ready", None)
            if ready is not None and ready.layer() is module and _still(ready):
                return ready.value  # type: ignore[no-any-return]
        chain: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        rule, raw = chain._modules["0"], chain._parameters.get("original")
        direct = type(raw) is Watched and type(rule) is SpectralNormalization and len(chain._modules) == 1
        if not direct or torch._C._is_tracing():
            return known.fget(module)  # type: ignore[no-any-return]
        if not plainly or rule.training or rule.scale is not None or (raw.requires_grad and torch.is_grad_enabled()):
            return NormalizedWeight(rule, raw)
        value = rule.deployed(raw)
        rule.ready = _ready(module, chain._parameters, raw, value)
        if found is None or found() is not rule:
            place = id(module)
            rules[place] = ref(rule, lambda _: rules.pop(place, None))
        return value  # type: ignore[no-any-return]

    setattr(type(module), name, property(read, known.fset))


def _ready(layer: nn.Module, parameters: dict[str, Any], raw: Watched, value: Tensor) -> Ready | None:
    if type(raw) is not Watched:  # by now it may be an ordinary one
        return None
    record = raw._record
    picked, lent = raw.detach().flatten()[:: max(1, raw.numel() // _FEW)], record.lent
    counts = raw._version, 0 if lent is None else lent._version
    return Ready(
        ref(layer), parameters, raw, record, record.token, *counts, raw.data_ptr(), picked, picked.tolist(), value
    )


def _still(ready: Ready) -> bool:
    """Whether the raw weight is the one that was deployed, and nobody asks for its gradient."""
    raw, lent = ready.raw, ready.record.lent
    return (
        ready.parameters["original"] is raw
        and ready.token is ready.record.token
        and ready.version == raw._version
        and ready.place == raw.data_ptr()
        and (lent is None or ready.lent == lent._version)
        and ready.sample == ready.picked.tolist()
        and not (torch.is_grad_enabled() and raw.requires_grad)
    )
