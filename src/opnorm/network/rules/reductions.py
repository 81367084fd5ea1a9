"""Norms, order statistics and sums along axes."""

import math
from math import prod
from typing import Any

import torch

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Matrix
from opnorm.graph import Node
from opnorm.network.rules.registry import Builder, register_rule, unsupported
from opnorm.network.rules.shape import part_rule


def reduced_axes(node: Node, build: Builder, axes: Any) -> list[int]:
    """The axes of the sample that an operation reduces; None stands for all of them.

    Raises:
        UnsupportedLayerError: if the batch is among them.
    """  # noqa: DOC501 - made by a helper
    before = build.graph[node.args[0].name]
    listed = range(len(before.shape)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    found = [before.sample_axis(axis) for axis in listed]
    if None in found:
        raise unsupported(node, "it mixes the samples of a batch")
    return [axis for axis in found if axis is not None]


@register_rule("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
def vector_norm(node: Node, build: Builder) -> int:
    """`| |u|_p - |w|_p | <= |u - w|_p <= n^max(0, 1/p - 1/2) |u - w|` over n elements, for p >= 1."""
    order = float(node.args[1]) if len(node.args) > 1 and node.args[1] is not None else 2.0
    axes = reduced_axes(node, build, node.args[2] if len(node.args) > 2 else None)
    source = build.source(node.args[0], node)
    if order < 1:
        return build.opaque(node, (source,), math.inf, "a p-norm with p < 1 has unbounded slopes")
    count = prod(build.shape(node.args[0])[axis] for axis in axes)
    constant = 1.0 if order >= 2 else count ** (1 / order - 0.5) * (1 + 1e-12)
    return build.opaque(node, (source,), constant, f"a norm with p = {order:g} of {count} elements")


@register_rule("aten.std.correction")
def standard_deviation(node: Node, build: Builder) -> int:
    """The norm of the centred elements over sqrt(n - correction): centring is a projection."""
    axes = reduced_axes(node, build, node.args[1] if len(node.args) > 1 else None)
    correction = node.kwargs.get("correction")
    count = prod(build.shape(node.args[0])[axis] for axis in axes) - (1.0 if correction is None else float(correction))
    if count <= 0:
        raise unsupported(node, "it divides by zero")
    constant = rounding.div_up(1.0, rounding.sqrt_down(count))
    return build.opaque(node, (build.source(node.args[0], node),), constant, "a centred norm over sqrt(n - correction)")


@register_rule("aten.logsumexp.default")
def log_sum_exp(node: Node, build: Builder) -> int:
    """Its gradient is a softmax, of norm at most 1."""
    reduced_axes(node, build, node.args[1])
    return build.opaque(node, (build.source(node.args[0], node),), 1.0, "the gradient of logsumexp is a softmax")


@part_rule("aten.topk.default", "aten.kthvalue.default", "aten.median.dim", "aten.nanmedian.dim")
def order_statistics(whole: Node, node: Node, build: Builder) -> int:
    """Some of the sorted elements: sorting is 1-Lipschitz."""
    place = 2 if whole.op.split(".")[1] in ("topk", "kthvalue") else 1
    axis = whole.args[place] if len(whole.args) > place else whole.kwargs.get("dim", -1)
    reduced_axes(whole, build, axis)
    return build.opaque(node, (build.source(whole.args[0], node),), 1.0, "some of the sorted elements")


@part_rule("aten.cummax.default", "aten.cummin.default")
def running_maximum(whole: Node, node: Node, build: Builder) -> int:
    """Each of n results differs by at most the largest difference of its elements."""
    (axis,) = reduced_axes(whole, build, whole.args[1])
    constant = rounding.sqrt_up(float(build.shape(whole.args[0])[axis]))
    return build.opaque(node, (build.source(whole.args[0], node),), constant, "running maxima of n elements: sqrt(n)")


@register_rule("aten.cumsum.default")
def running_sum(node: Node, build: Builder) -> int:
    """A triangular matrix of ones along the axis."""
    (axis,) = reduced_axes(node, build, node.args[1])
    shape = build.shape(node.args[0])
    name = build.constant(torch.ones(shape[axis], shape[axis], dtype=torch.float64).tril(), "running sums")
    linear = Matrix(shape, shape, name, prod(shape[:axis]), prod(shape[axis + 1 :]))
    return build.linear(node, build.source(node.args[0], node), linear)


@register_rule("aten.col2im.default")
def fold(node: Node, build: Builder) -> int:
    """Overlapping blocks added up: the adjoint of cutting out, which copies an element as often as they overlap."""
    before = build.graph[node.args[0].name]
    if before.batch_axis != 0 or before.merged != 1:
        raise unsupported(node, "it needs the batch as its first axis")
    overlaps = float(node.function(torch.ones(2, *before.sample_shape, dtype=torch.float64), *node.args[1:]).max())
    constant = rounding.sqrt_up(overlaps)
    return build.opaque(node, (build.source(node.args[0], node),), constant, f"up to {overlaps:g} blocks overlap")
