"""Normalisation layers, globally by their eps."""

import math
from math import prod
from typing import Any

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Scale
from opnorm.graph import Node, Weight
from opnorm.network.normalisation import Normalisation
from opnorm.network.rules.linear import channel_scale
from opnorm.network.rules.registry import Builder, register_rule, unsupported
from opnorm.network.rules.shape import part_rule
from opnorm.network.rules.shifts import shifted

_REASON = "normalising is 1/sqrt(eps)-Lipschitz: its Jacobian is a projection over the standard deviation"


def _normalised(node: Node, build: Builder, source: int, eps: float, group: int, *, centred: bool = True) -> int:
    """The normalisation itself, over `group` elements in a row at a time."""
    constant, reason = math.inf, "normalising without eps is unbounded at constant inputs"
    if eps > 0:
        constant, reason = rounding.div_up(1.0, rounding.sqrt_down(eps)), _REASON
    parameters = Normalisation(group, eps, centred, share=group).parameters
    return build.opaque(node, (source,), constant, reason, kind="normalize", parameters=parameters)


def _affine(node: Node, build: Builder, position: int, weight: Any, bias: Any, axis: int | None) -> int:
    """Multiply by the layer's weight and add its bias, along one axis of the sample or along its last ones (None)."""
    scaled = _scaled(node, build, position, weight, axis)
    return shifted(node, build, scaled, bias, axis=None if axis is None else axis + 1)


def _scaled(node: Node, build: Builder, position: int, weight: Any, axis: int | None) -> int:
    if weight is None:
        return position
    if not isinstance(weight, Weight):
        raise unsupported(node, "its weight depends on the inputs")
    shape, factors = node.sample_shape, build.weights[weight.name]
    if axis is None and factors.dim() == 1:
        axis = len(shape) - 1
    if axis is not None:
        return build.linear(node, position, Scale(shape, shape, weight.name, axis))
    spread = build.tensor(weight).expand(shape).reshape(-1).contiguous()
    flat = (spread.numel(),)
    return build.linear(node, position, Scale(flat, flat, build.constant(spread, weight.name), 0))


@register_rule("aten.layer_norm.default")
def layer_norm(node: Node, build: Builder) -> int:
    """`gamma (x - mean) / sqrt(var + eps)` over the last axes."""
    x, axes = node.args[:2]
    weight, bias = (*node.args[2:4], None, None)[:2]
    eps = float(node.args[4]) if len(node.args) > 4 else 1e-5
    _require_last_axes(node, build, len(axes))
    group = prod(axes)
    return _affine(node, build, _normalised(node, build, build.source(x, node), eps, group), weight, bias, None)


@part_rule("aten.native_layer_norm.default")
def native_layer_norm(whole: Node, node: Node, build: Builder) -> int:
    """The same in the functional form of the graph."""
    x, axes, weight, bias, eps = whole.args[:5]
    _require_last_axes(whole, build, len(axes))
    position = _normalised(node, build, build.source(x, node), float(eps), prod(axes))
    return _affine(node, build, position, weight, bias, None)


@register_rule("aten.rms_norm.default")
def rms_norm(node: Node, build: Builder) -> int:
    """`gamma x / sqrt(mean(x^2) + eps)` over the last axes; without an eps torch takes that of the dtype."""
    x, axes = node.args[:2]
    weight = node.args[2] if len(node.args) > 2 else None
    eps = node.args[3] if len(node.args) > 3 else None
    _require_last_axes(node, build, len(axes))
    if eps is None:
        raise unsupported(node, "its eps is left to torch, which takes one that depends on the dtype; set it")
    position = _normalised(node, build, build.source(x, node), float(eps), prod(axes), centred=False)
    return _affine(node, build, position, weight, None, None)


@register_rule("aten.group_norm.default")
def group_norm(node: Node, build: Builder) -> int:
    """LayerNorm over each group of channels, with one factor per channel."""
    x = node.args[0]
    weight, bias = (*node.args[2:4], None, None)[:2]
    eps = float(node.args[4]) if len(node.args) > 4 else 1e-5
    _require_channels(node, build)
    group = prod(node.sample_shape) // int(node.args[1])
    return _affine(node, build, _normalised(node, build, build.source(x, node), eps, group), weight, bias, 0)


@part_rule("aten.native_group_norm.default")
def native_group_norm(whole: Node, node: Node, build: Builder) -> int:
    """The same in the functional form of the graph."""
    _require_channels(whole, build)
    source = build.source(whole.args[0], node)
    group = prod(node.sample_shape) // int(whole.args[6])
    position = _normalised(node, build, source, float(whole.args[7]), group)
    weight, bias = whole.args[1:3]
    return _affine(node, build, position, weight, bias, 0)


@register_rule("aten.instance_norm.default")
def instance_norm(node: Node, build: Builder) -> int:
    """LayerNorm over each channel; with running statistics in evaluation mode it is a BatchNorm."""
    x, weight, bias, mean, variance, use_input, _, eps = node.args[:8]
    _require_channels(node, build)
    if not use_input:
        return channel_scale(node, build, x, weight, bias, mean, variance, eps=float(eps))
    group = prod(node.sample_shape[1:])
    position = _normalised(node, build, build.source(x, node), float(eps), group)
    return _affine(node, build, position, weight, bias, 0)


def _require_last_axes(node: Node, build: Builder, count: int) -> None:
    before = build.graph[node.args[0].name]
    if any(before.sample_axis(-1 - i) is None for i in range(count)):
        raise unsupported(node, "it normalises along the batch axis")


def _require_channels(node: Node, build: Builder) -> None:
    before = build.graph[node.args[0].name]
    if before.batch_axis != 0 or before.merged != 1:
        raise unsupported(node, "it needs (batch, channels, ...)")
