"""Activation functions: elementwise by their slopes, the others by their Lipschitz constant."""

import math
from typing import Any

import torch

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import FIXED, UNBOUNDED, activation_slopes
from opnorm.certificate.network.program import Opaque, slopes
from opnorm.graph import Node, Ref, Weight
from opnorm.network.rules.lp_pooling import lp_pooling
from opnorm.network.rules.registry import Builder, label, register_rule, unsupported
from opnorm.network.rules.shape import broadcast, gathered, joined, part_rule

_PLAIN = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6", "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
    "tanh": "tanh", "tanh_": "tanh", "log_sigmoid": "log_sigmoid", "hardsigmoid": "hardsigmoid", "selu": "selu",
    "hardsigmoid_": "hardsigmoid", "hardswish": "hardswish", "hardswish_": "hardswish", "silu": "silu",
    "silu_": "silu", "mish": "mish", "mish_": "mish", "celu": "celu", "celu_": "celu", "selu_": "selu", "abs": "abs",
    "sin": "sin", "cos": "cos", "atan": "atan", "erf": "erf", "asinh": "asinh", "softplus": "softplus",
    "softshrink": "softshrink", "hardtanh": "hardtanh", "hardtanh_": "hardtanh", "clamp": "clamp",
    "clamp_min": "clamp", "clamp_max": "clamp", "clamp_": "clamp", "softsign": "softsign", "tanhshrink": "tanhshrink",
}  # fmt: skip


_SIGNED = {"celu": 1, "softplus": 1, "softshrink": 1}
"""How many parameters of a function must not be negative."""
_SOFTPLUS_SWITCH = 20.0
"""Where torch replaces softplus by its argument unless told otherwise: 2e-9 from it."""


@register_rule(*(f"aten.{name}.default" for name in _PLAIN))
def plain(node: Node, build: Builder) -> int:
    """Activations whose slopes do not depend on their parameters."""
    kind = _PLAIN[node.op.split(".")[1]]
    assert kind in FIXED
    if any(isinstance(a, Ref) for a in node.args[1:]):
        raise unsupported(node, "its parameters depend on the inputs")
    source = build.source(node.args[0], node)
    if kind in _SIGNED and any(isinstance(a, int | float) and a < 0 for a in node.args[1 : 1 + _SIGNED[kind]]):
        raise unsupported(node, "a negative parameter has no rule")
    if kind == "softplus" and len(node.args) > 2 and float(node.args[2]) < _SOFTPLUS_SWITCH:
        return build.opaque(node, (source,), math.inf, UNBOUNDED["softplus"], kind="")
    return build.elementwise(node, source, activation_slopes(kind, (), "", {}), kind=kind)


@register_rule("aten.gelu.default")
def gelu(node: Node, build: Builder) -> int:
    """GELU, exact or with the tanh approximation."""
    kind = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    source = build.source(node.args[0], node)
    return build.elementwise(node, source, activation_slopes(kind, (), "", {}), kind=kind)


@register_rule("aten.leaky_relu.default", "aten.leaky_relu_.default")
def leaky_relu(node: Node, build: Builder) -> int:
    """Slope alpha on the left, 1 on the right."""
    alpha = float(node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01))
    return _with_parameters(node, build, "leaky_relu", (alpha,))


@register_rule("aten.elu.default", "aten.elu_.default")
def elu(node: Node, build: Builder) -> int:
    """ELU, and SELU where it is exported so."""
    values = [float(v) for v in node.args[1:4]]
    if min(values, default=1.0) < 0:
        raise unsupported(node, "a negative parameter has no rule")
    return _with_parameters(node, build, "elu", tuple(values + [1.0] * (3 - len(values))))


@register_rule("aten.rrelu.default", "aten.rrelu_.default")
def rrelu(node: Node, build: Builder) -> int:
    """In evaluation mode a leaky ReLU with the mean slope."""
    low, high = (float(v) for v in (*node.args[1:3], *(1 / 8, 1 / 3)[len(node.args[1:3]) :]))
    if len(node.args) > 3 and node.args[3]:
        raise unsupported(node, "it is random in training mode; call model.eval() first")
    ends = (rounding.down((low + high) / 2), rounding.up((low + high) / 2))
    source = build.source(node.args[0], node)
    return build.elementwise(node, source, slopes(min(1.0, ends[0]), max(1.0, ends[1])))


@register_rule("aten.prelu.default")
def prelu(node: Node, build: Builder) -> int:
    """A leaky ReLU with a stored slope, one or one per channel."""
    x, weight = node.args[:2]
    if not isinstance(weight, Weight):
        raise unsupported(node, "its parameter depends on the inputs")
    if build.weights[weight.name].numel() > 1 and build.graph[x.name].sample_axis(1) != 0:
        raise unsupported(node, "the channels must follow the batch axis")
    limits = activation_slopes("prelu", (), weight.name, build.weights)
    return build.elementwise(node, build.source(x, node), limits, kind="prelu", weight=weight.name)


def _with_parameters(node: Node, build: Builder, kind: str, parameters: tuple[float, ...]) -> int:
    limits = activation_slopes(kind, parameters, "", {})
    return build.elementwise(node, build.source(node.args[0], node), limits, kind=kind, parameters=parameters)


_STEEP = {
    "exp": ("exp", "exp2", "expm1", "sinh", "cosh"), "log": ("log", "log1p", "log2", "log10", "logit"),
    "square": ("square",), "sqrt": ("sqrt",), "reciprocal": ("reciprocal",), "rsqrt": ("rsqrt",), "tan": ("tan",),
    "acos": ("acos", "asin", "acosh", "atanh", "erfinv"), "hardshrink": ("hardshrink",), "sign": ("sign", "sgn"),
    "round": ("round", "floor", "ceil", "trunc", "frac"),
}  # fmt: skip
_KIND = {f"aten.{name}.default": kind for kind, names in _STEEP.items() for name in names}
_KIND |= {
    "aten.remainder.Scalar": "round", "aten.fmod.Scalar": "round", "aten.atan2.default": "atan2",
    "aten.xlogy.Tensor": "log", "aten.prod.dim_int": "prod", "aten.var.correction": "square", "aten.var.dim": "square",
}  # fmt: skip

_SLOPED = frozenset({"aten.exp.default", "aten.expm1.default", "aten.square.default"})
"""Those whose slopes on a region are known by the name of their kind."""


@register_rule(*_KIND)
def unbounded(node: Node, build: Builder) -> int:
    """Functions whose slopes are unbounded: infinity, with the reason."""
    kind = _KIND[node.op]
    varied = [a for a in node.args if isinstance(a, Ref) and a.name in build.at]
    if node.op.split(".")[1] in ("prod", "var") and _reduces_batch(node, build):
        raise unsupported(node, "it mixes the samples of a batch")
    named = kind if node.op in _SLOPED else ""
    return build.opaque(node, tuple(build.source(a, node) for a in varied), math.inf, UNBOUNDED[kind], kind=named)


def _reduces_batch(node: Node, build: Builder) -> bool:
    before = build.graph[node.args[0].name]
    axes = node.args[1] if len(node.args) > 1 else None
    axes = range(len(before.shape)) if axes is None else [axes] if isinstance(axes, int) else axes
    return any(before.sample_axis(axis) is None for axis in axes)


@register_rule("aten.threshold.default", "aten.threshold_.default")
def threshold(node: Node, build: Builder) -> int:
    """A ReLU, shifted, where its value is its threshold; otherwise it jumps."""
    source = build.source(node.args[0], node)
    if float(node.args[1]) == float(node.args[2]):
        return build.elementwise(node, source, slopes(0.0, 1.0))
    return build.opaque(node, (source,), math.inf, UNBOUNDED["threshold"], kind="threshold")


@register_rule("aten.pow.Tensor_Scalar")
def power(node: Node, build: Builder) -> int:
    """The first power changes nothing; lp pooling ends in a power; the others are unbounded."""
    pooled = lp_pooling(node, build)
    if pooled is not None:
        return pooled
    source = build.source(node.args[0], node)
    if node.args[1] == 1:
        return source
    kind = "square" if node.args[1] == 2 else "power"
    return build.opaque(node, (source,), math.inf, UNBOUNDED[kind], kind=kind)


@register_rule("aten.softmax.int", "aten._softmax.default")
def softmax(node: Node, build: Builder) -> int:
    """1/2: the Jacobian is the covariance of a one-hot variable."""
    _along_sample(node, build)
    return build.opaque(node, (build.source(node.args[0], node),), 0.5, "softmax is 1/2-Lipschitz")


@register_rule("aten.log_softmax.int", "aten._log_softmax.default")
def log_softmax(node: Node, build: Builder) -> int:
    """`sqrt(n)`: the Jacobian I - 1 p^T is a projection of norm `|1| |p|` (or 0 where n = 1)."""
    axis = _along_sample(node, build)
    constant = rounding.sqrt_up(float(node.sample_shape[axis]))
    return build.opaque(node, (build.source(node.args[0], node),), constant, "log-softmax is sqrt(n)-Lipschitz")


@register_rule("aten.maximum.default", "aten.minimum.default", "aten.logaddexp.default")
def pair(node: Node, build: Builder) -> int:
    """The larger or the smaller of two, smoothly or not: both together are a sorting, which is 1-Lipschitz.

    Where the model takes both from the same pair (MaxMin), they are one step.
    """
    both = tuple(dict.fromkeys(a.name for a in node.args[:2] if isinstance(a, Ref)))
    twin = _twin(node, build)
    if twin is None or len(both) < 2:
        return _pair_alone(node, build)
    known = f"{min(node.name, twin.name)} sorted"
    if known not in build.at:
        sizes = (node.sample_shape, node.sample_shape)
        stacked = (2, *node.sample_shape)
        first, second = (build.source(a, node) for a in node.args[:2])
        shapes = tuple((1, *s) for s in sizes)
        pairs = joined(node, build, (first, second), shapes, axis=0, shape=stacked)
        build.at[known] = build.add(
            Opaque((pairs,), stacked, label(node), 1.0, "sorting pairs is 1-Lipschitz", "sort of pairs")
        )
    size = math.prod(node.sample_shape)
    start = size if node.op.startswith("aten.minimum") else 0
    return gathered(node, build, build.at[known], torch.arange(start, start + size), (2, *node.sample_shape))


def _twin(node: Node, build: Builder) -> Node | None:
    """The other of maximum and minimum of the same two tensors."""
    wanted = {"aten.maximum.default": "aten.minimum.default", "aten.minimum.default": "aten.maximum.default"}
    if node.op not in wanted or not all(isinstance(a, Ref) for a in node.args[:2]):
        return None
    if build.graph[node.args[0].name].shape != build.graph[node.args[1].name].shape:
        return None
    return next(
        (n for n in build.graph.nodes if n.op == wanted[node.op] and set(n.args[:2]) == set(node.args[:2])), None
    )


def _pair_alone(node: Node, build: Builder) -> int:
    arguments: list[Any] = list(node.args[:2])
    varied = [a for a in arguments if isinstance(a, Ref) and a.name in build.at]
    positions = tuple(broadcast(node, build, a) for a in varied)
    if len(positions) == 1:  # the other one is stored: slopes 0 or 1
        return build.elementwise(node, positions[0], slopes(0.0, 1.0))
    return build.opaque(node, positions, 1.0, "|max(a, b) - max(c, d)| <= max(|a - c|, |b - d|)")


def _along_sample(node: Node, build: Builder) -> int:
    axis = build.graph[node.args[0].name].sample_axis(node.args[1])
    if axis is None:
        raise unsupported(node, "it acts along the batch axis")
    return axis


@part_rule("aten.sort.default", "aten.sort.stable")
def sort(whole: Node, node: Node, build: Builder) -> int:
    """Sorting is 1-Lipschitz in every symmetric norm (rearrangement inequality); the indices have no rule."""
    axis = whole.args[1] if len(whole.args) > 1 and isinstance(whole.args[1], int) else whole.kwargs.get("dim", -1)
    if build.graph[whole.args[0].name].sample_axis(axis) is None:
        raise unsupported(node, "it sorts along the batch axis")
    return build.opaque(node, (build.source(whole.args[0], node),), 1.0, "sorting is 1-Lipschitz")
