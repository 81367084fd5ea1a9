"""How far a float64 evaluation of a network is from its exact value: a running error bound, operation by operation.

For the operations whose rounding is known: sums of products (gamma_n times the sum of absolute values), and what
rounds nothing or once (ReLU, max pooling, moving data, sums, multiples). Others, whose accuracy is that of a library's
function (exp, tanh, erf), have no bound here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.graph import Graph, Node, Ref, Weight
from opnorm.graph.batch import filled

Pairs = dict[str, Any]
"""Values, or their errors, by node: tensors, or tuples of tensors."""

_SLACK = 1 + 1e-9
"""For the rounding of the error bounds themselves."""

_UNDERFLOW = 1e-150
"""Above what squares of tiny errors lose."""

_SUMS = frozenset({
    "linear", "matmul", "mm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean", "sum",
})  # fmt: skip
_EXACT = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "abs", "neg"})
_MOVES = frozenset({
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "slice", "select", "narrow", "expand", "flip", "roll", "clone", "contiguous", "detach", "alias", "dropout", "cat",
    "concat", "stack", "chunk", "split", "split_with_sizes", "unbind", "pixel_shuffle", "pixel_unshuffle", "pad",
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "maximum", "minimum", "movedim",
})  # fmt: skip


_PADS = {"aten.pad.default": 3, "aten.constant_pad_nd.default": 2}
"""How many arguments come before the value of a padding."""


class _Unknown(Exception):
    """An operation without an error bound."""


Reach = Callable[[dict[str, float]], float]
"""From how far the nodes' values are off, each by its own rounding, to how far all outputs together are, above it."""


def proved_quotient(
    graph: Graph, batches: tuple[Tensor, ...], distance: float, reach: Reach | None = None
) -> float | None:
    """A proved lower bound of `|f(x) - f(y)| / |x - y|` for the two samples of a batch; None where there is no bound.

    Args:
        graph: with weights in float64.
        batches: the inputs, two samples each.
        distance: an upper bound of `|x - y|`.
        reach: what carries errors on where their bounds element by element exceed the difference. These grow with the
            norms of the weights' absolute values, and those of a network's `reach` with the weights' norms.
    """
    try:
        values, errors = _evaluated(graph, batches)
        found = _quotient(graph, values, distance, _size_of(graph, errors))
        if found == 0.0 and reach is not None:
            values, own = _evaluated(graph, batches, carried=False)
            found = _quotient(graph, values, distance, _reached(graph, values, own, reach))
    except _Unknown:
        return None
    return found


def evaluation_error(graph: Graph, batches: tuple[Tensor, ...], reach: Reach) -> float | None:
    """An upper bound of how far the two samples' outputs together are from the exact ones; None where there is none."""
    try:
        return _reached(graph, *_evaluated(graph, batches, carried=False), reach)
    except _Unknown:
        return None


def _quotient(graph: Graph, values: Pairs, distance: float, doubt: float) -> float:
    """The computed quotient less what the errors of both results, `doubt` together, can change."""
    squared, sizes, count = 0.0, 0.0, 0
    for name in graph.outputs:
        first, second = graph[name].samples(values[name])
        squared += float((first - second).square().sum())
        sizes += float((first.abs() + second.abs()).square().sum())
        count += first.numel()
    lost = (doubt + 2 * rounding.U * sizes**0.5) * _SLACK
    least = squared**0.5 * (1 - rounding.gamma(count + 16)) - lost - _UNDERFLOW
    # A doubt that is no number proves nothing.
    return max(0.0, rounding.div_down(least * (1 - 4 * rounding.U), distance)) if least > 0 else 0.0


def _size_of(graph: Graph, errors: Pairs) -> float:
    """The norm of the errors of both samples' outputs, added up element by element."""
    return math.sqrt(sum(float(graph[n].samples(errors[n]).sum(0).square().sum()) for n in graph.outputs))


def _reached(graph: Graph, values: Pairs, own: Pairs, reach: Reach) -> float:
    total = 0.0
    for sample in (0, 1):
        sizes: dict[str, float] = {}
        for name, error in own.items():
            each = graph[name].samples(error.expand(values[name].shape))[sample]
            sizes[name] = float(each.square().sum()) ** 0.5 * _SLACK + _UNDERFLOW
        total = rounding.add_up(total, reach(sizes))
    return total


def distance_up(x: Tensor, y: Tensor) -> float:
    """An upper bound of `|x - y|`."""
    return float((x - y).norm()) * (1 + rounding.gamma(x.numel() + 16)) + rounding.TINY


def _evaluated(graph: Graph, batches: tuple[Tensor, ...], *, carried: bool = True) -> tuple[Pairs, Pairs]:
    """The values and their errors; where these are not carried on, those that each node that rounds adds by itself."""
    values: Pairs = {}
    errors: Pairs = {}
    own: Pairs = {}
    queue = list(batches)
    for node in graph.nodes:
        if node.op == "input":
            values[node.name] = queue.pop(0)
            errors[node.name] = torch.zeros(values[node.name].shape, dtype=torch.float64)
            continue
        name = node.op.removeprefix("aten.").split(".")[0].removesuffix("_")
        args, kwargs = _arguments(node, values, graph)
        # An operation in place would change what the bound is about.
        fresh = [a.clone() if isinstance(a, Tensor) and node.op.split(".")[1:2] == [f"{name}_"] else a for a in args]
        values[node.name] = node.function(*fresh, **kwargs)
        error = _error(node, name, values, errors, graph)
        if not carried:
            if name in _SUMS or name in _RULES:
                own[node.name] = error
            error = _nothing(values[node.name])
        errors[node.name] = error
    return values, errors if carried else own


def _nothing(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros((), dtype=torch.float64).expand(value.shape)
    return tuple(map(_nothing, value))


def _arguments(node: Node, values: Pairs, graph: Graph) -> tuple[list[Any], dict[str, Any]]:
    kwargs = {k: filled(a, values, graph.weights) for k, a in node.kwargs.items()}
    return list(filled(node.args, values, graph.weights)), kwargs


def _error(node: Node, name: str, values: Pairs, errors: Pairs, graph: Graph) -> Any:
    if name == "getitem":
        return errors[node.args[0].name][node.args[1]]
    if name in _EXACT:
        return errors[_first(node).name]
    if name in _MOVES:
        return _moved(node, errors, graph)
    if name in _SUMS:
        return _summed(node, name, values, errors, graph)
    rule = _RULES.get(name)
    if rule is None:
        raise _Unknown
    return rule(node, values, errors, graph)


def _first(node: Node) -> Ref:
    if not isinstance(node.args[0], Ref):
        raise _Unknown
    return node.args[0]


def _moved(node: Node, errors: Pairs, graph: Graph) -> Any:
    """The errors go where the values go; of a maximum, the largest."""
    nothing = {name: torch.zeros_like(weight) for name, weight in graph.weights.items()}
    args = filled(node.args, errors, nothing)
    if node.op == "aten.minimum.default":
        return torch.maximum(*args)
    if node.op in _PADS:  # with zeros, which are exact
        return node.function(*args[: _PADS[node.op]])
    return node.function(*args, **node.kwargs)


def _summed(node: Node, name: str, values: Pairs, errors: Pairs, graph: Graph) -> Tensor:
    """`|W| e + gamma_n (|W| |x| + |b|)` for sums of n products."""
    varied = [a for a in node.args if isinstance(a, Ref)]
    if len(varied) != 1 or any(isinstance(a, Ref) for a in node.kwargs.values()):
        raise _Unknown
    sizes = {n: w.abs() for n, w in graph.weights.items() if w.is_floating_point()}
    weight = next((graph.weights[a.name] for a in node.args[:2] if isinstance(a, Weight)), None)
    terms = values[varied[0].name].numel()
    if weight is not None:
        terms = weight.numel() // min(weight.shape[:2]) if name in ("matmul", "mm") or "transpose" in name else (
            weight.numel() // weight.shape[0]
        )  # fmt: skip
    absolute = {varied[0].name: values[varied[0].name].abs()}
    kwargs = {k: filled(a, {}, sizes) for k, a in node.kwargs.items()}
    majorant = node.function(*filled(node.args, absolute, sizes), **kwargs)
    # The bias is exact: its place is empty where the errors pass through.
    plain = [None if i == 2 and isinstance(a, Weight) else a for i, a in enumerate(node.args)]
    carried = node.function(*filled(plain, {varied[0].name: errors[varied[0].name]}, sizes), **_without_bias(kwargs))
    return (carried + majorant * rounding.gamma(terms + 16)) * _SLACK + rounding.TINY * terms  # type: ignore[no-any-return]


def _without_bias(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: a for k, a in kwargs.items() if k != "bias"}


def _added(node: Node, values: Pairs, errors: Pairs, graph: Graph) -> Tensor:
    alpha = abs(float(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)))
    (a, e), (b, f) = (_term(argument, values, errors, graph) for argument in node.args[:2])
    out: Tensor = values[node.name]
    total = e + alpha * f + 4 * rounding.U * (abs(a) + alpha * abs(b))
    return (out.new_zeros(out.shape) + total) * _SLACK  # type: ignore[no-any-return]


def _multiplied(node: Node, values: Pairs, errors: Pairs, graph: Graph) -> Tensor:
    if isinstance(node.args[0], Ref) == isinstance(node.args[1], Ref):
        raise _Unknown
    (a, e), (b, f) = (_term(argument, values, errors, graph) for argument in node.args[:2])
    return (abs(a) * f + abs(b) * e + 2 * rounding.U * values[node.name].abs()) * _SLACK + rounding.TINY  # type: ignore[no-any-return]


def _divided(node: Node, values: Pairs, errors: Pairs, graph: Graph) -> Tensor:
    if isinstance(node.args[1], Ref):
        raise _Unknown
    e, (b, _) = errors[_first(node).name], _term(node.args[1], values, errors, graph)
    return (e / abs(b) + 2 * rounding.U * values[node.name].abs()) * _SLACK + rounding.TINY  # type: ignore[no-any-return]


def _term(argument: Any, values: Pairs, errors: Pairs, graph: Graph) -> tuple[Any, Any]:
    if isinstance(argument, Ref):
        return values[argument.name], errors[argument.name]
    return (graph.weights[argument.name].double() if isinstance(argument, Weight) else float(argument)), 0.0


def _leaky(node: Node, values: Pairs, errors: Pairs, graph: Graph) -> Tensor:
    slope = abs(float(node.args[1] if len(node.args) > 1 else 0.01))
    return (max(1.0, slope) * errors[_first(node).name] + 2 * rounding.U * values[node.name].abs()) * _SLACK  # type: ignore[no-any-return]


def _batch_norm(node: Node, values: Pairs, errors: Pairs, graph: Graph) -> Tensor:
    """`x a + (b - mean a)` with a computed factor, in any order of the operations."""
    if len(node.args) < 8 or node.args[5] or not isinstance(node.args[4], Weight):
        raise _Unknown
    x = values[_first(node).name]

    def channels(argument: Any, otherwise: float) -> Tensor:
        stored = torch.tensor([otherwise]) if argument is None else graph.weights[argument.name]
        return stored.double().reshape(-1, *([1] * (x.dim() - 2)))

    scale, bias, mean = (channels(a, d) for a, d in zip(node.args[1:4], (1.0, 0.0, 0.0), strict=True))
    factor = scale.abs() / (channels(node.args[4], 1.0) + float(node.args[7])).sqrt()
    size = factor * (x.abs() + mean.abs()) + bias.abs()
    return (factor * errors[node.args[0].name] + 32 * rounding.U * size) * _SLACK  # type: ignore[no-any-return]


_RULES: dict[str, Callable[[Node, Pairs, Pairs, Graph], Tensor]] = {
    "add": _added, "sub": _added, "mul": _multiplied, "div": _divided, "leaky_relu": _leaky, "batch_norm": _batch_norm,
}  # fmt: skip
