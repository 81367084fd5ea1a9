"""A forward of the layer's own class that meets the deployed weight, and in training the raw one, at once.

`torch.nn.Module.__getattr__` and torch's parametrization cost more than all that has to be looked at before a deployed
weight is used again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import _symbolic_trace

from opnorm.layers.registry import comes_to_the_same
from opnorm.parametrize import trained
from opnorm.parametrize.chains import alone, chain_at_hand
from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.transforms import transformed
from opnorm.parametrize.values import as_integers
from opnorm.parametrize.watched import Record, Watched

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_TRANSPOSED: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    nn.ConvTranspose1d.forward: F.conv_transpose1d,
    nn.ConvTranspose2d.forward: F.conv_transpose2d,
    nn.ConvTranspose3d.forward: F.conv_transpose3d,
}

_FEW = 3
"""Entries that are looked at although writes are noticed: what NumPy and compiled fused steps write is not."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ready:
    """A deployed weight, and all there is to look at before it is used again.

    Between two products the processor forgets everything else, so each place that is looked up costs more than many
    comparisons: there are few, and they lie together.
    """

    version: int
    raw: Watched
    place: int
    record: Record
    token: object
    lent: int
    held: dict[str, Any]
    rules: dict[str, Any]
    rule: SpectralNormalization
    chains: dict[str, Any]
    chain: nn.Module
    lists: nn.Module
    picked: memoryview
    sample: list[int]
    value: Tensor
    bias: Tensor | None
    layer: "ref[nn.Module]"
    known: "dict[int, Ready]"
    key: int

    def over(self) -> None:
        """Let nobody use it again."""
        if self.known.get(self.key) is self:
            self.known.pop(self.key, None)


def forward_directly(module: nn.Module, name: str) -> None:
    """Replace the forward of the layer's own class, which its copies share, by one that comes to the same.

    Only where the layer's forward is torch's and hands the weight and the bias to one operation.
    """
    cls: Any = type(module)
    base, plain = cls.__bases__[0], cls.forward
    operation: Any = _TRANSPOSED.get(plain)
    known: dict[int, Ready] = {}

    # The forward of the base may be replaced later, for one layer's class or for all of torch's.
    def linear(self: nn.Linear, input: Tensor) -> Tensor:
        ready = _usable(self, known) if base.forward is plain else None
        if ready is None:
            out = trained.linear(self, input) if self.training and base.forward is plain else None
            return base.forward(self, input) if out is None else out
        return F.linear(input, ready.value, ready.bias)

    def convolution(self: nn.Conv2d, input: Tensor) -> Tensor:
        ready = _usable(self, known) if base.forward is plain else None
        if ready is None:
            as_made = self.training and (base.forward, base._conv_forward) == methods
            out = trained.convolution(self, input) if as_made else None
            return base.forward(self, input) if out is None else out
        return self._conv_forward(input, ready.value, ready.bias)  # type: ignore[no-any-return]

    def transposed(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        ready = _usable(self, known) if base.forward is plain else None
        if ready is None:
            return base.forward(self, input, output_size)  # type: ignore[no-any-return]
        added = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        settings = self.stride, self.padding, added, self.groups, self.dilation
        return operation(input, ready.value, ready.bias, *settings)  # type: ignore[no-any-return]

    methods = plain, getattr(cls, "_conv_forward", None)
    if name != "weight":
        return
    if plain is nn.Linear.forward:
        cls.forward = comes_to_the_same(linear)
    elif methods in [(conv.forward, conv._conv_forward) for conv in _CONVOLUTIONS]:
        cls.forward = comes_to_the_same(convolution)
    elif operation is not None:
        cls.forward = comes_to_the_same(transposed)


def _usable(layer: nn.Module, known: dict[int, Ready]) -> Ready | None:
    """The deployed weight, if the raw weight is the one that was deployed and nobody asks for its gradient.

    One function, as each call costs what several comparisons cost.
    """
    if is_dynamo_compiling() or torch._C._is_tracing() or _symbolic_trace._is_fx_tracing_flag:
        return None
    ready = known.get(id(layer))
    if ready is None:
        return _ready(layer, known)
    raw, record, holds = ready.raw, ready.record, layer.__dict__
    if (
        type(raw) is Watched  # else it may be one that counts nothing, and says so by an error
        and ready.version == raw._version
        and ready.place == raw.data_ptr()  # first: what lay elsewhere may have been freed
        and ready.token is record.token
        and (record.lent is None or ready.lent == record.lent._version)
        and ready.held.get("original") is raw
        and ready.rules.get("0") is ready.rule
        and len(ready.rules) == 1  # no other parametrization has come
        and ready.chains.get("weight") is ready.chain
        and holds["_modules"].get("parametrizations") is ready.lists
        and holds["_parameters"].get("bias", raw) is ready.bias
        and "bias" not in holds  # it would hide the parameter
        and ready.sample == ready.picked.tolist()
        and not (raw.requires_grad and is_grad_enabled())
    ):
        return ready
    return _ready(layer, known)


def _ready(layer: nn.Module, known: dict[int, Ready]) -> Ready | None:
    """The deployed weight, where it may be handed out without asking again; None where reading it does more."""
    chain = chain_at_hand(layer)
    if chain is None:
        known.pop(id(layer), None)  # torch has taken the parametrization off
        return None
    pair = alone(chain)
    if pair is None:
        return None
    rule, raw = pair
    if rule.training or rule.scale is not None or (raw.requires_grad and is_grad_enabled()) or transformed(raw):
        return None
    value = rule.deployed(raw)
    picked = _sampled(raw) if type(raw) is Watched else None  # by now it may be an ordinary one
    if picked is None or "bias" not in layer._parameters or "bias" in layer.__dict__:
        return None
    record, place = raw._record, id(layer)
    lists: Any = layer._modules["parametrizations"]
    ready = known[place] = Ready(
        raw._version,
        raw,
        raw.data_ptr(),
        record,
        record.token,
        0 if record.lent is None else record.lent._version,
        chain._parameters,
        chain._modules,
        rule,
        lists._modules,
        chain,
        lists,
        picked,
        picked.tolist(),
        value,
        layer._parameters["bias"],
        ref(layer, lambda _: known.pop(place, None)),  # another layer may come to lie there
        known,
        place,
    )
    rule.hand_out(ready)
    return ready


def _sampled(raw: Tensor) -> memoryview | None:
    """A view of the bits of a few entries, None where the weight leaves gaps in memory.

    Of all that can read three numbers here, a memory view touches the least.
    """
    order = sorted(range(raw.ndim), key=raw.stride, reverse=True)
    flat = raw.detach().permute(order).reshape(-1)
    if flat.data_ptr() != raw.data_ptr() or flat.is_conj() or flat.is_neg():
        return None
    real = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
    step = max(1, len(real) // _FEW)
    every: Any = np.from_dlpack(as_integers(real))  # `.numpy()` would forbid to resize the storage
    return memoryview(every)[step // 2 :: step]
