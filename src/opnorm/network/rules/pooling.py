"""Pooling, means and sums, interpolation."""

from math import prod
from typing import Any

import torch

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Convolution, Gather, Matrix
from opnorm.graph import Node
from opnorm.network.rules.registry import Builder, register_rule, unsupported
from opnorm.network.rules.shape import part_rule

_LARGEST_MATRIX = 4096


@register_rule("aten.mean.dim", "aten.sum.dim_IntList", "aten.mean.default", "aten.sum.default")
def mean(node: Node, build: Builder) -> int:
    """The mean over n elements has norm 1/sqrt(n), their sum sqrt(n)."""
    x = node.args[0]
    before = build.graph[x.name]
    axes = node.args[1] if len(node.args) > 1 and node.args[1] is not None else range(len(before.shape))
    reduced = [before.sample_axis(a) for a in ([axes] if isinstance(axes, int) else axes)]
    if any(a is None for a in reduced):
        raise unsupported(node, "it mixes the samples of a batch")
    order = [i for i in range(len(before.sample_shape)) if i not in reduced] + sorted(
        a for a in reduced if a is not None
    )
    shape = before.sample_shape
    index = torch.arange(prod(shape)).reshape(shape).permute(order).reshape(-1)
    source = build.source(x, node)
    size = prod(shape)
    if not torch.equal(index, torch.arange(size)):
        name = build.constant(index, f"{node.name} index")
        shape = tuple(shape[i] for i in order)
        source = build.linear(node, source, Gather(before.sample_shape, shape, name))
    count = prod(before.sample_shape[a] for a in reduced if a is not None)
    average = ".mean." in node.op
    row = torch.full((1, count), 1 / count if average else 1.0, dtype=torch.float64)
    name = build.constant(row, "mean" if average else "sum")
    linear = Matrix(shape, node.sample_shape, name, size // count, rounded=int(average))
    return build.linear(node, source, linear)


@register_rule("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def average_pool(node: Node, build: Builder) -> int:
    """A depthwise convolution where every window counts the same; otherwise its matrix."""
    x, kernel = node.args[:2]
    source, shape = build.source(x, node), build.shape(x)
    dims = len(shape) - 1
    _require_images(node, build)
    kernel = as_tuple(kernel, dims)
    stride = as_tuple(node.args[2] if len(node.args) > 2 and node.args[2] else kernel, dims)
    padding = as_tuple(node.args[3] if len(node.args) > 3 else 0, dims)
    ceil = bool(node.args[4]) if len(node.args) > 4 else bool(node.kwargs.get("ceil_mode", False))
    counts = bool(node.args[5]) if len(node.args) > 5 else bool(node.kwargs.get("count_include_pad", True))
    divisor = node.args[6] if len(node.args) > 6 else node.kwargs.get("divisor_override")
    if not ceil and (counts or not any(padding)):
        value = 1 / (divisor or prod(kernel))
        name = build.constant(torch.full((shape[0], 1, *kernel), value, dtype=torch.float64), "average")
        pairs = tuple((p, p) for p in padding)
        ones = (1,) * dims
        linear = Convolution(shape, node.sample_shape, name, kernel, stride, pairs, ones, shape[0], rounded=1)
        return build.linear(node, source, linear)
    return _by_matrix(node, build, source, shape)


@register_rule(*(f"aten.adaptive_avg_pool{d}d.default" for d in (1, 2, 3)), "aten._adaptive_avg_pool2d.default")
def adaptive_average_pool(node: Node, build: Builder) -> int:
    """The mean of all positions, or the matrix of one channel."""
    _require_images(node, build)
    source, shape = build.source(node.args[0], node), build.shape(node.args[0])
    if prod(node.sample_shape[1:]) > 1:
        return _by_matrix(node, build, source, shape)
    size = prod(shape[1:])
    name = build.constant(torch.full((1, size), 1 / size, dtype=torch.float64), "mean")
    return build.linear(node, source, Matrix(shape, node.sample_shape, name, shape[0], rounded=1))


def _by_matrix(node: Node, build: Builder, source: int, shape: tuple[int, ...]) -> int:
    """The same map on every channel, from a run on the basis of one channel: each entry is one rounded quotient."""
    size = prod(shape[1:])
    if size > _LARGEST_MATRIX:
        raise unsupported(node, f"its windows differ, and {size} positions are too many for their matrix")
    basis = torch.eye(size, dtype=torch.float64).reshape(size, 1, *shape[1:])
    matrix = node.function(basis, *node.args[1:], **node.kwargs).reshape(size, -1).mT.contiguous()
    name = build.constant(matrix, "pooling")
    return build.linear(node, source, Matrix(shape, node.sample_shape, name, shape[0], rounded=4))


@register_rule(*(f"aten.max_pool{d}d.default" for d in (1, 2, 3)))
def max_pool(node: Node, build: Builder) -> int:
    """Sqrt of the largest number of windows that one element is in."""
    return _max_pool(node, node, build)


@part_rule(*(f"aten.max_pool{d}d_with_indices.default" for d in (1, 2, 3)))
def max_pool_part(whole: Node, node: Node, build: Builder) -> int:
    """The same, where the indices are computed too."""
    return _max_pool(whole, node, build)


def _max_pool(whole: Node, node: Node, build: Builder) -> int:
    x, kernel = whole.args[:2]
    source, shape = build.source(x, node), build.shape(x)
    dims = len(shape) - 1
    _require_images(whole, build)
    kernel = as_tuple(kernel, dims)
    stride = as_tuple(whole.args[2] if len(whole.args) > 2 and whole.args[2] else kernel, dims)
    padding = as_tuple(whole.args[3] if len(whole.args) > 3 else 0, dims)
    dilation = as_tuple(whole.args[4] if len(whole.args) > 4 else 1, dims)
    count, _ = windows(shape, node.sample_shape, kernel, stride, padding=padding, dilation=dilation)
    reason = f"an element is in up to {count} windows" if count > 1 else "max pooling without overlap is 1-Lipschitz"
    return build.opaque(node, (source,), rounding.sqrt_up(float(count)), reason, kind="max_pool")


def windows(
    shape: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, int]:
    """The largest number of windows that an element is in, and the smallest number of elements of a window."""
    count, smallest = 1, 1
    for axis, size in enumerate(shape[1:]):
        covered = torch.zeros(size, dtype=torch.int64)
        least = kernel[axis]
        for window in range(out[1 + axis]):
            taps = window * stride[axis] - padding[axis] + dilation[axis] * torch.arange(kernel[axis])
            inside = taps[(taps >= 0) & (taps < size)]
            covered[inside] += 1
            least = min(least, len(inside))
        count, smallest = count * int(covered.max()), smallest * least
    return count, smallest


@part_rule(*(f"aten.adaptive_max_pool{d}d.default" for d in (1, 2, 3)))
def adaptive_max_pool(whole: Node, node: Node, build: Builder) -> int:
    """Max pooling with windows from floor(i n / m) to ceil((i + 1) n / m)."""
    shape, out = build.shape(whole.args[0]), node.sample_shape
    _require_images(whole, build)
    count = 1
    for n, m in zip(shape[1:], out[1:], strict=True):
        covered = torch.zeros(n, dtype=torch.int64)
        for window in range(m):
            covered[window * n // m : -(-(window + 1) * n // m)] += 1
        count *= int(covered.max())
    source = build.source(whole.args[0], node)
    reason = f"an element is in up to {count} windows"
    return build.opaque(node, (source,), rounding.sqrt_up(float(count)), reason, kind="max_pool")


@part_rule("aten.max.dim", "aten.min.dim")
def largest(whole: Node, node: Node, build: Builder) -> int:
    """The largest along an axis is 1-Lipschitz."""
    return _largest(whole, node, build)


@register_rule("aten.amax.default", "aten.amin.default")
def amax(node: Node, build: Builder) -> int:
    """The largest along axes is 1-Lipschitz."""
    return _largest(node, node, build)


def _largest(whole: Node, node: Node, build: Builder) -> int:
    axes = whole.args[1] if len(whole.args) > 1 else []
    axes = [axes] if isinstance(axes, int) else axes
    if not axes or any(build.graph[whole.args[0].name].sample_axis(a) is None for a in axes):
        raise unsupported(node, "it mixes the samples of a batch")
    return build.opaque(node, (build.source(whole.args[0], node),), 1.0, "a maximum is 1-Lipschitz")


@register_rule(
    "aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_trilinear3d.vec",
    "aten.upsample_linear1d.default", "aten.upsample_bilinear2d.default", "aten.upsample_trilinear3d.default",
)  # fmt: skip
def interpolation(node: Node, build: Builder) -> int:
    """`sqrt(|A|_1 |A|_inf)` of the interpolation: its rows are weights of a mean, its columns are summed."""
    _require_images(node, build)
    shape = build.shape(node.args[0])
    origin = torch.zeros(1, 1, *shape[1:], dtype=torch.float64)
    pull = torch.func.vjp(lambda x: node.function(x, *node.args[1:], **node.kwargs), origin)[1]
    out = torch.ones(1, 1, *node.sample_shape[1:], dtype=torch.float64)
    columns = float(pull(out)[0].max())
    constant = rounding.sqrt_up(rounding.mul_up(columns, 1 + 1e-9))
    return build.opaque(node, (build.source(node.args[0], node),), constant, "interpolation: row and column sums")


@register_rule(
    "aten.upsample_bicubic2d.vec", "aten._upsample_bicubic2d_aa.vec", "aten._upsample_bilinear2d_aa.vec",
)  # fmt: skip
def signed_interpolation(node: Node, build: Builder) -> int:
    """`sqrt(|A|_1 |A|_inf)` of the interpolation's matrix on one channel, whose entries may be negative."""
    _require_images(node, build)
    shape = build.shape(node.args[0])
    size = prod(shape[1:])
    if size > _LARGEST_MATRIX:
        raise unsupported(node, f"{size} positions are too many for its matrix")
    basis = torch.eye(size, dtype=torch.float64).reshape(size, 1, *shape[1:])
    matrix = node.function(basis, *node.args[1:], **node.kwargs).reshape(size, -1).abs()
    sums = rounding.mul_up(float(matrix.sum(0).max()), float(matrix.sum(1).max()), 1 + 1e-9)
    reason = "interpolation: row and column sums"
    return build.opaque(node, (build.source(node.args[0], node),), rounding.sqrt_up(sums), reason)


def _require_images(node: Node, build: Builder) -> None:
    before = build.graph[node.args[0].name]
    if before.batch_axis != 0 or before.merged != 1:
        raise unsupported(node, "it needs the batch as its first axis")
    dims = next((d for d in (1, 2, 3) if f"{d}d" in node.op), None)
    if dims is not None and len(before.shape) != dims + 2:
        raise unsupported(node, f"it needs (batch, channels, {dims} spatial axes); x.unsqueeze(1) gives one channel")


def as_tuple(value: Any, dims: int) -> tuple[int, ...]:
    """One number per axis, from a number or a list of one or as many."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))
