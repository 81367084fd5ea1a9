"""Sums, differences, multiples, and products of tensors."""

import math
from typing import Any

import torch

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import activation_slopes
from opnorm.certificate.network.maps import Scale
from opnorm.certificate.network.program import Elementwise, Sum, slopes
from opnorm.graph import Node, Ref, Weight
from opnorm.network.rules.handwritten import gated, normalised
from opnorm.network.rules.linear import scaled
from opnorm.network.rules.registry import Builder, label, register_rule, unsupported
from opnorm.network.rules.shape import broadcast
from opnorm.network.rules.shifts import shifted


@register_rule(*(f"aten.{name}{kind}" for name in ("add", "add_", "sub", "sub_") for kind in (".Tensor", ".Scalar")))
def add(node: Node, build: Builder) -> int:
    """`x + alpha y` or `x - alpha y`; a stored or constant summand is a shift, which cancels in differences."""
    sign = -1.0 if node.op.startswith("aten.sub") else 1.0
    alpha = sign * float(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1))
    return _combined(node, build, [(1.0, node.args[0]), (alpha, node.args[1])])


@register_rule("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(node: Node, build: Builder) -> int:
    """`y - alpha x`."""
    alpha = float(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1))
    return _combined(node, build, [(-alpha, node.args[0]), (1.0, node.args[1])])


def _combined(node: Node, build: Builder, terms: list[tuple[float, Any]]) -> int:
    varied = [(c, a) for c, a in terms if isinstance(a, Ref) and a.name in build.at]
    if len(varied) == 2 and varied[0][1] == varied[1][1]:
        varied = [(varied[0][0] + varied[1][0], varied[0][1])]
    positions = [broadcast(node, build, a) for _, a in varied]
    coefficients = tuple(c for c, _ in varied)
    position = positions[0]
    if coefficients != (1.0,):
        position = build.add(Sum(tuple(positions), node.sample_shape, label(node), coefficients))
    for coefficient, added in terms:
        if not (isinstance(added, Ref) and added.name in build.at):
            position = shifted(node, build, position, added, coefficient=coefficient)
    return position


@register_rule("aten.neg.default", "aten.neg_.default")
def negative(node: Node, build: Builder) -> int:
    """`-x`."""
    return build.add(Sum((build.source(node.args[0], node),), node.sample_shape, label(node), (-1.0,)))


@register_rule("aten.mul.Tensor", "aten.mul.Scalar", "aten.mul_.Tensor", "aten.mul_.Scalar")
def multiply(node: Node, build: Builder) -> int:
    """A multiple by a number or by a stored tensor; of two tensors that vary, unbounded outside a region."""
    left, right = node.args[:2]
    if not isinstance(left, Ref) or left.name not in build.at:
        left, right = right, left
    if isinstance(right, int | float):
        return build.add(Sum((build.source(left, node),), node.sample_shape, label(node), (float(right),)))
    if isinstance(right, Weight):
        return scaled(node, build, left, right)
    if isinstance(right, Ref) and right.name not in build.at:
        return _times_label(node, build, left, right)
    for x, inverse in ((left, right), (right, left)):
        if (whole := normalised(node, build, x, inverse, inverse=True)) is not None:
            return whole
    if build.split and (whole := gated(node, build)) is not None:
        return whole
    return _product(node, build, left, right)


def _product(node: Node, build: Builder, left: Ref, right: Ref) -> int:
    """`d(x g) = g dx + x dg`, g and x halfway between two points: Lipschitz where both factors are bounded."""
    positions = tuple(broadcast(node, build, a) for a in (left, right))
    (x_low, x_high), (g_low, g_high) = build.ranges.of(left), build.ranges.of(right)
    largest = [max(abs(low), abs(high)) for low, high in ((x_low, x_high), (g_low, g_high))]
    if not all(map(math.isfinite, largest)):
        reason = "a product of two varying tensors has unbounded slopes; give a region"
        return build.opaque(node, positions, math.inf, reason, kind="multiply")
    if not build.split:
        constant = rounding.sqrt_up(rounding.add_up(*(rounding.mul_up(n, n) for n in largest)))
        return build.opaque(node, positions, constant, "a product of two bounded tensors", kind="multiply")
    name = label(node)
    first = build.add(Elementwise((positions[0],), node.sample_shape, f"{name} (first factor)", *slopes(g_low, g_high)))
    second = build.add(
        Elementwise((positions[1],), node.sample_shape, f"{name} (second factor)", *slopes(x_low, x_high))
    )
    return build.add(Sum((first, second), node.sample_shape, name, (1.0, 1.0)))


def _times_label(node: Node, build: Builder, x: Ref, label_part: Ref) -> int:
    """A product with the embedding of a label that is not varied: each factor is one of its column's entries."""
    table = build.graph[label_part.name]
    if table.op != "aten.embedding.default" or not isinstance(table.args[0], Weight):
        raise unsupported(node, f"it multiplies with {table.place}, which depends on a label in a way that has no rule")
    if table.sample_shape != build.shape(x):
        raise unsupported(node, "the embedding and the tensor that it multiplies have different shapes")
    rows = build.tensor(table.args[0])
    shape = build.shape(x)
    low, high = (end.expand(shape).contiguous() for end in (rows.amin(0), rows.amax(0)))
    return build.elementwise(node, build.source(x, node), slopes(low, high))


@register_rule("aten.div.Tensor", "aten.div.Scalar", "aten.div_.Tensor", "aten.div_.Scalar")
def divide(node: Node, build: Builder) -> int:
    """A quotient by a number or by a stored tensor."""
    x, divisor = node.args[:2]
    source = build.source(x, node)
    if isinstance(divisor, int | float):
        values = torch.tensor([float(divisor)], dtype=torch.float64)
    elif isinstance(divisor, Weight):
        values = build.tensor(divisor)
    elif _is_softsign(x, divisor, build):
        return build.elementwise(node, source, activation_slopes("softsign", (), "", {}), kind="softsign")
    elif (whole := normalised(node, build, x, divisor)) is not None:
        return whole
    else:
        positions = (source, build.source(divisor, node))
        return build.opaque(node, positions, float("inf"), "a quotient of two varying tensors has unbounded slopes")
    inverse = 1 / values
    if not bool(torch.isfinite(inverse).all()):
        raise unsupported(node, "it divides by zero")
    if values.numel() == 1:
        name = build.constant(inverse.reshape(1), "reciprocal")
        shape = node.sample_shape
        return build.linear(node, source, Scale(shape, shape, name, 0, rounded=1))
    if node.sample_shape != build.shape(x):
        source = broadcast(node, build, x)
    spread = node.samples(inverse.expand(node.shape))[0].reshape(-1).contiguous()
    flat = (spread.numel(),)
    return build.linear(node, source, Scale(flat, flat, build.constant(spread, "reciprocals"), 0, rounded=1))


def _is_softsign(x: Any, divisor: Any, build: Builder) -> bool:
    """Whether the quotient is `x / (|x| + 1)`, as torch exports Softsign."""
    plus = build.graph[divisor.name]
    if plus.op != "aten.add.Tensor" or plus.args[1] != 1 or plus.kwargs or not isinstance(plus.args[0], Ref):
        return False
    size = build.graph[plus.args[0].name]
    return size.op == "aten.abs.default" and size.args[0] == x


@register_rule(
    "aten.clone.default", "aten.contiguous.default", "aten.detach.default", "aten.alias.default",
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default", "aten.dropout.default",
    "aten.feature_dropout.default", "aten.alpha_dropout.default", "aten.detach_.default", "aten.type_as.default",
    "aten.lift_fresh_copy.default", "aten.dropout_.default", "aten.positive.default", "prims.copy_strided.default",
)  # fmt: skip
def same(node: Node, build: Builder) -> int:
    """Operations that change no value: copies, casts between floats, dropout in evaluation mode."""
    if "dropout" in node.op and node.args[2]:
        raise unsupported(node, "dropout is in training mode; call model.eval() first")
    if any(isinstance(a, torch.dtype) and not a.is_floating_point for a in (*node.args, *node.kwargs.values())):
        raise unsupported(node, "it casts to integers, which jumps")
    return build.source(node.args[0], node)
