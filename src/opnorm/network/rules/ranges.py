"""Between which numbers every element of a tensor lies, for all inputs: what gates are bounded by.

In exact arithmetic: sigmoid in [0, 1], tanh in [-1, 1], and interval arithmetic, rounded outward, on what is made of
them. A product of two bounded tensors is Lipschitz; this is where the bounds come from.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.graph import Graph, Node, Ref, Weight

Range = tuple[float, float]

_UNKNOWN = (-math.inf, math.inf)

_OF_FUNCTIONS: dict[str, Range] = {
    "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0), "softsign": (-1.0, 1.0),
    "sin": (-1.0, 1.0), "cos": (-1.0, 1.0), "erf": (-1.0, 1.0), "atan": (-1.5707963267948968, 1.5707963267948968),
    "relu6": (0.0, 6.0), "relu": (0.0, math.inf), "abs": (0.0, math.inf), "softplus": (0.0, math.inf),
    "softmax": (0.0, 1.0), "_softmax": (0.0, 1.0),
}  # fmt: skip

_MOVES = frozenset({
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "slice", "select", "narrow", "expand", "flip", "clone", "contiguous", "detach", "alias", "to", "dropout",
    "expand_as", "repeat", "mean", "amax", "amin",
})  # fmt: skip
_PIECES = frozenset({"chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk"})


class Ranges:
    """The ranges of a graph's nodes, each computed once.

    Args:
        graph: the graph.
        weights: its weights by name.
    """

    def __init__(self, graph: Graph, weights: dict[str, Tensor]) -> None:
        """Compute nothing yet."""
        self._graph = graph
        self._weights = weights
        self._known: dict[str, Range] = {}

    def of(self, argument: Any) -> Range:
        """The range of an argument of a node: infinite ends where nothing is known."""
        if isinstance(argument, int | float):
            return float(argument), float(argument)
        if isinstance(argument, Weight):
            value = self.value(argument)
            return float(value.min()), float(value.max())
        if not isinstance(argument, Ref):
            return _UNKNOWN
        # In the order of the graph: an unrolled recurrence is deeper than Python's stack.
        for node in self._graph.nodes if argument.name not in self._known else ():
            if node.name not in self._known:
                self._known[node.name] = self._node(node)
            if node.name == argument.name:
                break
        return self._known[argument.name]

    def value(self, weight: Weight) -> Tensor:
        """A stored tensor in float64."""
        return self._weights[weight.name].detach().to("cpu", torch.float64)

    def _node(self, node: Node) -> Range:
        name = node.op.removeprefix("aten.").split(".")[0].removesuffix("_")
        if name in _OF_FUNCTIONS:
            return _OF_FUNCTIONS[name]
        if name in _MOVES or name in _PIECES or name == "getitem":
            return self.of(node.args[0]) if self._passes(node, name) else _UNKNOWN
        rule = _ARITHMETIC.get(name)
        return _UNKNOWN if rule is None else rule(self, node)

    def _passes(self, node: Node, name: str) -> bool:
        if name != "getitem":
            return True
        whole = self._graph[node.args[0].name]
        return whole.op.removeprefix("aten.").split(".")[0] in _PIECES

    def convex(self, node: Node) -> Range | None:
        """The hull of a and b where the node is `(a - b) z + b` with z in [0, 1], as in a GRU; None elsewhere."""
        for product, rest in (node.args[:2], node.args[1::-1]):
            inner = self._graph[product.name] if isinstance(product, Ref) else None
            if inner is None or not inner.op.startswith("aten.mul"):
                continue
            for difference, gate in (inner.args[:2], inner.args[1::-1]):
                before = self._graph[difference.name] if isinstance(difference, Ref) else None
                if before is None or not before.op.startswith("aten.sub") or before.kwargs or len(before.args) > 2:
                    continue
                low, high = self.of(gate)
                if before.args[1] == rest and low >= 0 and high <= 1:
                    return hull(self.of(before.args[0]), self.of(rest))
        return None


def hull(*ranges: Range) -> Range:
    """The smallest range that holds all of them."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _sum(ranges: Ranges, node: Node) -> Range:
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    sign = -1.0 if node.op.startswith("aten.sub") else 1.0
    if sign > 0 and alpha == 1 and (between := ranges.convex(node)) is not None:
        return between
    first, second = ranges.of(node.args[0]), _times(ranges.of(node.args[1]), (sign * alpha, sign * alpha))
    return rounding.down(first[0] + second[0]), rounding.up(first[1] + second[1])


def _product(ranges: Ranges, node: Node) -> Range:
    return _times(ranges.of(node.args[0]), ranges.of(node.args[1]))


def _times(first: Range, second: Range) -> Range:
    if not all(map(math.isfinite, (*first, *second))):
        return _UNKNOWN
    corners = [a * b for a in first for b in second]
    exact = all(abs(a) == 1 or a == 0 for a in first) or all(abs(b) == 1 or b == 0 for b in second)
    low, high = min(corners), max(corners)
    return (low, high) if exact else (rounding.down(low), rounding.up(high))


def _linear(ranges: Ranges, node: Node) -> Range:
    low, high = ranges.of(node.args[0])
    bias = node.args[2] if len(node.args) > 2 else None
    stored = isinstance(node.args[1], Weight) and not isinstance(bias, Ref)
    if not (stored and math.isfinite(low) and math.isfinite(high)):
        return _UNKNOWN
    weight = ranges.value(node.args[1])
    shift = torch.zeros(()) if bias is None else ranges.value(bias)
    middle, width = (low + high) / 2, (high - low) / 2
    centre, reach = weight.sum(1) * middle + shift, weight.abs().sum(1) * width
    error = (weight.abs().sum(1) * (abs(middle) + width) + shift.abs()) * rounding.gamma(weight.shape[1] + 8)
    spread = (reach + 2 * error) * (1 + 8 * rounding.U)
    return rounding.down(float((centre - spread).min())), rounding.up(float((centre + spread).max()))


def _joined(ranges: Ranges, node: Node) -> Range:
    return hull(*(ranges.of(part) for part in node.args[0]))


def _clamped(ranges: Ranges, node: Node) -> Range:
    ends = (*node.args[1:3], None, None)
    low, high = node.kwargs.get("min", ends[0]), node.kwargs.get("max", ends[1])
    name = node.op.removeprefix("aten.").split(".")[0].removesuffix("_")
    if name == "clamp_max":
        low, high = None, ends[0]
    if name == "hardtanh":
        low, high = (-1.0 if ends[0] is None else ends[0]), (1.0 if ends[1] is None else ends[1])
    before = ranges.of(node.args[0])
    if not all(end is None or isinstance(end, int | float) for end in (low, high)):
        return _UNKNOWN
    bottom, top = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return min(max(before[0], bottom), top), max(min(before[1], top), bottom)


_ARITHMETIC: dict[str, Callable[[Ranges, Node], Range]] = {
    "add": _sum, "sub": _sum, "mul": _product, "cat": _joined, "stack": _joined, "clamp": _clamped,
    "linear": _linear, "clamp_min": _clamped, "clamp_max": _clamped, "hardtanh": _clamped,
}  # fmt: skip
