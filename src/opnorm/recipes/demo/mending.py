"""Dividing a network that is trained already: the decisions stay, the outputs shrink by the product of the norms."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.data import Digits
from opnorm.norms import norm
from opnorm.norms.casting import scale_to_bound
from opnorm.recipes.demo.promise import Promise, accuracy, promise
from opnorm.recipes.demo.training import weighted


@dataclass(frozen=True)
class Mended:
    """A network whose weights were divided by their proved norms, and whose biases by the product so far.

    Attributes:
        net: the network; its constant is proved to be at most 1.
        shrunk: by how much its outputs are smaller: the product of the norms, rounded up.
        accuracy: the same as before.
        kept: what the constant 1 promises.
        biases_kept: accuracy where the weights are divided, but not the biases.
    """

    net: nn.Module
    shrunk: float
    accuracy: float
    kept: Promise
    biases_kept: float


def layer_norms(net: nn.Module, sample: Tensor) -> dict[str, Enclosure]:
    """Return the proved norm of every layer at the input size that it has in the network."""
    shapes = _input_shapes(net, sample)
    return {name: norm(layer, input_shape=shapes[name]) for name, layer in weighted(net).items()}


def mend(net: nn.Module, data: Digits, norms: dict[str, Enclosure]) -> Mended:
    """Divide every weight of `net` by its norm, and every bias by the product of the norms up to it."""
    divided, shapes = copy.deepcopy(net), _input_shapes(net, data.test_images[:1])
    scales, scale = {}, 1.0
    for name, layer in weighted(divided).items():
        before = layer.weight.clone()
        after = scale_to_bound(before, norms[name], measure=partial(_norm_with, layer, shapes[name]))
        layer.weight.copy_(after)
        largest = before.abs().argmax()
        scale *= float(after.flatten()[largest] / before.flatten()[largest])
        scales[name] = scale
    biases_kept = accuracy(divided, data)
    for name, scale in scales.items():
        divided.get_parameter(f"{name}.bias").mul_(scale)
    product = rounding.mul_up(*(found.upper for found in norms.values()))
    return Mended(divided, product, accuracy(divided, data), promise(divided, data, 1.0), biases_kept)


def _input_shapes(net: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, layer in net.named_children():
        shapes[name] = tuple(x.shape[1:])
        x = layer(x)
    return shapes


@torch.no_grad()
def _norm_with(layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], weight: Tensor) -> Enclosure:
    """The norm of `layer` with another weight, which it keeps."""
    layer.weight.copy_(weight)
    return norm(layer, input_shape=shape)
