"""Linear layers, convolutions, BatchNorm in evaluation mode, products with weights."""

from math import prod
from typing import Any

import torch

from opnorm.certificate.network.maps import Convolution, Matrix, Scale, TransposedConvolution
from opnorm.errors import WeightError
from opnorm.graph import Node, Ref, Weight
from opnorm.network.rules.followed import filled_with
from opnorm.network.rules.registry import Builder, register_rule, unsupported
from opnorm.network.rules.shape import broadcast, part_rule
from opnorm.network.rules.shifts import shifted


@register_rule("aten.linear.default")
def linear(node: Node, build: Builder) -> int:
    """`y = x W^T + b` along the last axis."""
    x, weight, bias = node.args[0], node.args[1], _argument(node, 2, "bias")
    source = build.source(x, node)
    _require_weight(weight, node)
    _require_constant(bias, node)
    shape = build.shape(x)
    if build.graph[x.name].sample_axis(-1) is None:
        raise unsupported(node, "it acts on the batch axis")
    rows = build.weights[weight.name].shape[0]
    matrix = Matrix(shape, (*shape[:-1], rows), weight.name, prod(shape[:-1]))
    return shifted(node, build, build.linear(node, source, matrix), bias)


@register_rule(*(f"aten.conv{d}d.{kind}" for d in (1, 2, 3) for kind in ("default", "padding")))
def convolution(node: Node, build: Builder) -> int:
    """Torch's convolutions; a padding operation just before is taken into the convolution."""
    x, weight, bias = *node.args[:2], _argument(node, 2, "bias")
    _require_weight(weight, node)
    _require_constant(bias, node)
    kernel = tuple(build.weights[weight.name].shape[2:])
    dims = len(kernel)
    stride = _tuple(_argument(node, 3, "stride", 1), dims)
    dilation = _tuple(_argument(node, 5, "dilation", 1), dims)
    padding = _padding(_argument(node, 4, "padding", 0), kernel, dilation)
    groups = int(_argument(node, 6, "groups", 1))
    source, shape, circular = build.source(x, node), build.shape(x), False
    merged = _padded_before(build.graph[x.name], build, dims)
    if merged is not None and not any(map(sum, padding)):
        source, shape, padding, circular = merged
    if len(shape) != dims + 1 or build.graph[x.name].batch_axis != 0:
        raise unsupported(node, f"it needs (batch, channels, {dims} spatial axes)")
    linear = Convolution(shape, node.sample_shape, weight.name, kernel, stride, padding, dilation, groups, circular)
    return shifted(node, build, build.linear(node, source, linear), bias, axis=1)


def _padded_before(
    node: Node, build: Builder, dims: int
) -> tuple[int, tuple[int, ...], tuple[tuple[int, int], ...], bool] | None:
    """The source, shape and widths of a zero or circular padding of the spatial axes; None for anything else."""
    if node.op != "aten.pad.default":
        return None
    widths = list(node.args[1])
    mode = node.args[2] if len(node.args) > 2 else "constant"
    if mode not in ("constant", "circular") or len(widths) > 2 * dims or min(widths) < 0:
        return None
    if build.shifts and filled_with(node) != 0:
        return None
    widths += [0] * (2 * dims - len(widths))
    pairs = tuple((widths[2 * i], widths[2 * i + 1]) for i in reversed(range(dims)))
    return build.source(node.args[0], node), build.shape(node.args[0]), pairs, mode == "circular"


@register_rule("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(node: Node, build: Builder) -> int:
    """Torch's transposed convolutions."""
    x, weight, bias = *node.args[:2], _argument(node, 2, "bias")
    _require_weight(weight, node)
    _require_constant(bias, node)
    dims = len(build.weights[weight.name].shape) - 2
    stride, padding, output = (
        _tuple(_argument(node, i, name, default), dims)
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    groups, dilation = int(_argument(node, 6, "groups", 1)), _tuple(_argument(node, 7, "dilation", 1), dims)
    shape = build.shape(x)
    if len(shape) != dims + 1 or build.graph[x.name].batch_axis != 0:
        raise unsupported(node, f"it needs (batch, channels, {dims} spatial axes)")
    linear = TransposedConvolution(shape, node.sample_shape, weight.name, stride, padding, output, dilation, groups)
    return shifted(node, build, build.linear(node, build.source(x, node), linear), bias, axis=1)


@register_rule("aten.batch_norm.default")
def batch_norm(node: Node, build: Builder) -> int:
    """In evaluation mode: each channel times `weight / sqrt(running_var + eps)`."""
    x, *stored, training, _, eps = node.args[:8]
    if training or stored[-1] is None:
        raise unsupported(node, "in training mode BatchNorm mixes the samples of a batch; call model.eval() first")
    return channel_scale(node, build, x, *stored, eps=float(eps))


@part_rule("aten._native_batch_norm_legit_no_training.default")
def native_batch_norm(whole: Node, node: Node, build: Builder) -> int:
    """The same, as the functional form of the graph names it."""
    x, *stored, _, eps = whole.args[:7]
    return channel_scale(node, build, x, *stored, eps=float(eps))


def channel_scale(
    node: Node, build: Builder, x: Ref, weight: Any, bias: Any, mean: Any, variance: Weight, *, eps: float
) -> int:
    """`weight (x - mean) / sqrt(variance + eps) + bias`, channel by channel."""
    shape = build.shape(x)
    if build.graph[x.name].sample_axis(1) != 0:
        raise unsupported(node, "the channels must follow the batch axis")
    if not bool((build.tensor(variance) + eps > 0).all()):
        raise WeightError(f"the variance {variance.name!r} plus eps is not positive, so {node.place} has no constant")
    name = weight.name if isinstance(weight, Weight) else ""
    centred = shifted(node, build, build.source(x, node), mean, axis=1, coefficient=-1.0)
    scale = build.linear(node, centred, Scale(shape, shape, name, 0, variance.name, eps))
    return shifted(node, build, scale, bias, axis=1)


def scaled(node: Node, build: Builder, x: Ref, weight: Weight) -> int:
    """A product with a stored tensor of any shape, which may enlarge x."""
    shape, factors = node.sample_shape, build.weights[weight.name]
    source = build.source(x, node) if shape == build.shape(x) else broadcast(node, build, x)
    if factors.numel() == 1:
        return build.linear(node, source, Scale(shape, shape, weight.name, 0))
    full = node.samples(build.tensor(weight).expand(node.shape))
    if not torch.equal(full[0], full[1]):
        raise unsupported(node, "the weight differs between the samples of a batch")
    for axis in range(len(shape)):
        line = full[0].movedim(axis, 0).reshape(shape[axis], -1)
        if bool((line == line[:, :1]).all()) and factors.numel() == shape[axis]:
            return build.linear(node, source, Scale(shape, shape, weight.name, axis))
    name = build.constant(full[0].reshape(-1).contiguous(), f"{weight.name} spread")
    flat = (prod(shape),)
    return build.linear(node, source, Scale(flat, flat, name, 0))


def _require_weight(argument: Any, node: Node) -> None:
    if not isinstance(argument, Weight):
        raise unsupported(node, "its weight depends on the inputs")


def _require_constant(argument: Any, node: Node) -> None:
    if isinstance(argument, Ref):
        raise unsupported(node, "its bias depends on the inputs")


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return tuple((0, 0) for _ in kernel)
    if value == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _tuple(value, len(kernel)))
