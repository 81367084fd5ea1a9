"""A layer's output in training, past the object that stands for its weight: reading that costs a small product."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from opnorm.parametrize import direct
from opnorm.parametrize.chains import alone, chain_at_hand
from opnorm.parametrize.convolved import geometry
from opnorm.parametrize.rule import Rule
from opnorm.parametrize.transforms import traced


class _Met(NamedTuple):
    """What an input meets."""

    rule: Rule
    raw: Tensor
    bias: Tensor | None


def linear(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """Return the output, or None where the layer's own forward has to read the weight."""
    met = _met(layer, x)
    return None if met is None else direct.linear(met.rule, x, met.raw, met.bias)


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor | None:
    """Return the output, or None where the layer's own forward has to read the weight, or pads."""
    met = _met(layer, x) if layer.padding_mode == "zeros" else None
    if met is None:
        return None
    shape = geometry(len(layer.kernel_size), layer.stride, layer.padding, layer.dilation, layer.groups)
    return direct.convolution(met.rule, x, met.raw, met.bias, shape)


def _met(layer: nn.Module, x: Tensor) -> _Met | None:
    """The rule, the raw weight and the bias, if they are all there is and nobody else looks at what is called."""
    if is_dynamo_compiling() or traced() or torch._C._is_torch_function_mode_enabled() or type(x) is not Tensor:
        return None
    chain = chain_at_hand(layer)
    pair = None if chain is None else alone(chain)
    if pair is None or not pair[0].training or "bias" not in layer._parameters or "bias" in layer.__dict__:
        return None
    return _Met(*pair, layer._parameters["bias"])
