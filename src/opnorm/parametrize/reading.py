"""How a layer reads its normalised weight: past torch's parametrization, whose steps cost more than a small product."""

from dataclasses import dataclass
from sys import _getframe
from types import CodeType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from opnorm.parametrize.lazy import NormalizedWeight
from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.watched import Record, Watched

_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = frozenset(layer.forward.__code__ for layer in _READERS)
"""Code that hands the weight to one operation and does nothing else with it."""

_FEW = 3
"""Entries that are looked at although writes are noticed: what NumPy and compiled fused steps write is not."""


@dataclass(slots=True, eq=False)
class Ready:
    """A deployed weight, and all there is to look at before it is used again.

    Between two products the processor forgets everything else, so each place that is looked up costs more than many
    comparisons: there are few, and they lie together.
    """

    reader: CodeType | None
    raw: Watched
    version: int
    place: int
    record: Record
    token: object
    lent: int
    parameters: dict[str, Any]
    rules: dict[str, Any]
    layer: "ref[nn.Module]"
    picked: Tensor
    sample: list[float]
    value: Tensor


def read_directly(module: nn.Module, name: str) -> None:
    """Replace torch's property on the layer's own class, which its copies share, by one that comes to the same."""
    known: Any = getattr(type(module), name)
    held: dict[int, Ready] = {}

    def read(module: nn.Module) -> Tensor:
        if is_dynamo_compiling():
            return known.fget(module)  # type: ignore[no-any-return]
        ready, reader = held.get(id(module)), _getframe(1).f_code
        if ready is not None and ready.reader is reader and _still(ready):
            return ready.value
        chain: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        rule, raw = chain._modules["0"], chain._parameters.get("original")
        direct = type(raw) is Watched and type(rule) is SpectralNormalization and len(chain._modules) == 1
        if not direct or torch._C._is_tracing():
            return known.fget(module)  # type: ignore[no-any-return]
        asked_for_gradient = raw.requires_grad and is_grad_enabled()
        if reader not in _FORWARDS or rule.training or rule.scale is not None or asked_for_gradient:
            return NormalizedWeight(rule, raw)
        value: Tensor = rule.deployed(raw)
        if type(raw) is Watched:  # by now it may be an ordinary one
            place = id(module)
            layer = ref(module, lambda _: held.pop(place, None))  # another layer may come to lie there
            held[place] = _ready(layer, reader, chain, raw, value)
            rule.hand_out(held[place])
        return value

    setattr(type(module), name, property(read, known.fset))


def _ready(layer: "ref[nn.Module]", reader: CodeType, chain: nn.Module, raw: Watched, value: Tensor) -> Ready:
    record = raw._record
    picked, lent = raw.detach().flatten()[:: max(1, raw.numel() // _FEW)], record.lent
    version, lent_version = raw._version, 0 if lent is None else lent._version
    return Ready(
        reader,
        raw,
        version,
        raw.data_ptr(),
        record,
        record.token,
        lent_version,
        chain._parameters,
        chain._modules,
        layer,
        picked,
        picked.tolist(),
        value,
    )


def _still(ready: Ready) -> bool:
    """Whether the raw weight is the one that was deployed, and nobody asks for its gradient."""
    raw, record = ready.raw, ready.record
    return (
        ready.version == raw._version
        and ready.place == raw.data_ptr()
        and ready.token is record.token
        and (record.lent is None or ready.lent == record.lent._version)
        and ready.parameters.get("original") is raw
        and len(ready.rules) == 1  # no other parametrization has come
        and ready.sample == ready.picked.tolist()
        and not (raw.requires_grad and is_grad_enabled())
    )
