"""`softmax(scale q k^T + mask) v` in single operations, in any layout: found by following numbered elements."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opnorm.graph import Graph, Node, Ref, Weight
from opnorm.graph.batch import filled
from opnorm.network.attention.scores import Scores

_MOVES = frozenset({
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "mT", "unsqueeze",
    "squeeze", "expand", "movedim", "swapaxes", "swapdims", "select", "broadcast_to",
})  # fmt: skip
_COPIES = frozenset({
    "clone", "contiguous", "detach", "alias", "to", "_to_copy", "dropout", "lift_fresh_copy", "type_as",
})  # fmt: skip
_VIEWS = frozenset({"view", "_unsafe_view"})
_SOFTMAX = frozenset({"softmax", "_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "mm"})


@dataclass(frozen=True, eq=False)
class Written:
    """An attention as the graph holds it.

    Attributes:
        sources: the nodes that hold queries, keys and values.
        indices: which of a sample's elements they are, shape (heads, tokens, width) each, and which ones of the result
            are computed.
        scores: what is done to the products.
    """

    sources: tuple[str, ...]
    indices: tuple[Tensor, ...]
    scores: Scores


@dataclass(frozen=True, eq=False)
class _Softmax:
    """A softmax of scores: numbers of the product's elements, and `scale x + bias` for each, by number."""

    product: Node
    keys: int
    groups: Tensor
    operand: Tensor
    scale: Tensor
    bias: Tensor


def products(graph: Graph, node: Node) -> Written | None:
    """The attention that ends in a product of two varying tensors; None where it is another one."""
    if node.batch_axis is None or {node.sample_axis(-1), node.sample_axis(-2)} & {None}:
        return None
    lead = node.shape[:-2]
    for weights, content, turned in ((node.args[0], node.args[1], False), (node.args[1], node.args[0], True)):
        found = _followed(graph, weights)
        if found is None:
            continue
        grid, held = found.operand, numbers(graph, content.name)
        result = numbers(graph, node.name)
        if turned:
            grid, held, result = grid.mT, held.mT, result.mT
        grid, held = (x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (grid, held))
        tokens = _tokens(graph, found, grid)
        if tokens is None:
            continue
        sources = (*tokens[0], content.name, node.name)
        parts = [_sample(node, x, _size(graph, s)) for x, s in zip((*tokens[1], held, result), sources, strict=True)]
        scale, bias = (_sample(node, x[grid.long()], None) for x in (found.scale, found.bias))
        scores = None if scale is None or bias is None else _scores(scale, bias)
        if scores is not None and all(p is not None for p in parts):
            return Written(sources[:3], tuple(p for p in parts if p is not None), scores)
    return None


def _followed(graph: Graph, weights: Ref) -> _Softmax | None:
    """A softmax of a product of two varying tensors, and how an argument is made of it."""
    after = _path(graph, weights, _SOFTMAX)
    if after is None:
        return None
    softmax, moves = after
    before = _path(graph, softmax.args[0], _PRODUCTS)
    if before is None or not all(isinstance(a, Ref) for a in before[0].args[:2]):
        return None
    product, arithmetic = before
    number = numbers(graph, product.name)
    scale, bias = torch.ones_like(number), torch.zeros_like(number)
    for node in arithmetic:
        if (changed := _affine(graph, node, scale, bias)) is not None:
            scale, bias = changed
            number = number.expand_as(scale)
        else:
            number, scale, bias = (_moved(graph, node, x) for x in (number, scale, bias))
    if bool(scale.isnan().any() or bias.isnan().any()) or bool((number.reshape(-1).sort().values.diff() == 0).any()):
        return None
    lines, *rest = (x.movedim(softmax.args[1], -1) for x in (number, scale, bias))
    group = torch.arange(lines[..., 0].numel(), dtype=torch.float64).reshape(lines.shape[:-1])[..., None]
    table = torch.full((3, 2 * _size(graph, product.name) + 1), math.nan, dtype=torch.float64)
    for row, values in zip(table, (group.expand_as(lines), *rest), strict=True):
        row[lines.long()] = values
    operand = number
    for node in moves:
        if _name(node) in _ARITHMETIC:
            return None
        operand = _moved(graph, node, operand)
    return _Softmax(product, lines.shape[-1], table[0], operand, table[1], table[2])


def _tokens(graph: Graph, found: _Softmax, grid: Tensor) -> tuple[tuple[str, str], tuple[Tensor, Tensor]] | None:
    """The nodes of queries and keys and their elements for each row of a grid of scores; None where rows are mixed."""
    index = grid.long()
    group = found.groups[index]
    complete = bool((group == group[..., :1]).all()) and grid.shape[-1] == found.keys
    if not complete or bool((index.sort(-1).values.diff(dim=-1) == 0).any()):
        return None
    number = numbers(graph, found.product.name)
    rows, columns = number.shape[-2:]
    place = torch.empty(int(number.max()) + 1, dtype=torch.int64)
    place[number.reshape(-1).long()] = torch.arange(number.numel())
    head, row, column = place[index] // (rows * columns), place[index] // columns % rows, place[index] % columns
    left, right = (numbers(graph, a.name) for a in found.product.args[:2])
    lead = number.shape[:-2]
    left, right = (x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (left, right.mT))
    if not bool((head == head[:, :1, :1]).all()):
        return None
    names = [a.name for a in found.product.args[:2]]
    for first, second, q, k, order in ((left, right, row, column, 1), (right, left, column, row, -1)):
        if bool((q == q[..., :1]).all()) and bool((k == k[:, :1]).all()):
            chosen = first[head[:, :, 0], q[..., 0]], second[head[:, 0], k[:, 0]]
            return (names[::order][0], names[::order][1]), chosen
    return None


def _scores(scale: Tensor, bias: Tensor) -> Scores | None:
    """With one scale for each query; None where it varies from key to key."""
    top = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    kept = (scale != 0) | (bias == -math.inf)
    if not bool(((scale == top) | (scale == 0)).all()) or bool((bias == math.inf).any()):
        return None
    return Scores(top[..., 0], bias, None if bool(kept.all()) else kept)


def _path(graph: Graph, ref: Any, until: frozenset[str]) -> tuple[Node, list[Node]] | None:
    """The operation that an argument comes from, by operations on each element, and these in order."""
    path: list[Node] = []
    while isinstance(ref, Ref):
        node = graph[ref.name]
        name = _name(node)
        if name in until and node.batch_axis is not None:
            return node, path[::-1]
        passes = name in _MOVES | _COPIES or name in _ARITHMETIC
        if not passes or (name == "dropout" and node.args[2]):
            return None
        path.append(node)
        refs = [a for a in node.args if isinstance(a, Ref)]
        ref = refs[0] if len(refs) == 1 or name == "type_as" else None
    return None


_ARITHMETIC = frozenset({"mul", "div", "add", "sub", "where", "masked_fill"})


def _affine(graph: Graph, node: Node, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
    """`scale x + bias` after an operation; None where it is a move."""
    name = _name(node)
    if name not in _ARITHMETIC:
        return None
    args = [filled(a, {}, graph.weights) if isinstance(a, Weight) else a for a in node.args]
    numbers_ = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    nothing = torch.full_like(scale, math.nan), bias
    at = next(i for i, a in enumerate(node.args) if isinstance(a, Ref))
    if name in ("mul", "div"):
        other = numbers_[1 - at]
        if node.kwargs or (name == "div" and at == 1):
            return nothing
        return (scale * other, bias * other) if name == "mul" else (scale / other, bias / other)
    if name in ("add", "sub"):
        alpha = node.kwargs.get("alpha", 1)
        sign = -1.0 if name == "sub" else 1.0
        if at == 0:
            shifted = bias + sign * alpha * numbers_[1]
            return scale.expand_as(shifted), shifted
        shifted = numbers_[0] + sign * alpha * bias
        return (sign * alpha * scale).expand_as(shifted), shifted
    if at == 0 and name == "where":
        return nothing
    mask = numbers_[0] if name == "where" else ~numbers_[1]
    other = numbers_[3 - at] if name == "where" else numbers_[2]
    mask = ~mask if at == 2 else mask
    other = torch.as_tensor(other, dtype=torch.float64)
    return torch.where(mask, scale, 0.0), torch.where(mask, bias, other)


def _moved(graph: Graph, node: Node, x: Tensor) -> Tensor:
    if _name(node) in _COPIES:
        return x
    (ref,) = (a for a in node.args if isinstance(a, Ref))
    function = torch.reshape if _name(node) in _VIEWS else node.function
    moved: Tensor = function(*filled(node.args, {ref.name: x}, graph.weights), **node.kwargs)
    return moved


def _name(node: Node) -> str:
    parts = node.op.split(".")
    return parts[1].removesuffix("_") if parts[0] == "aten" and len(parts) > 1 else ""


def numbers(graph: Graph, name: str) -> Tensor:
    """Each element of two samples with a number of its own from 1 on, in the layout of the node."""
    node = graph[name]
    size = math.prod(node.sample_shape)
    return node.batched(torch.arange(1, 2 * size + 1, dtype=torch.float64).reshape(2, *node.sample_shape))


def _size(graph: Graph, name: str) -> int:
    return math.prod(graph[name].sample_shape)


def _sample(node: Node, values: Tensor, size: int | None) -> Tensor | None:
    """One sample's part of values for each row of a node: numbers from 0 on, or what is the same for all samples."""
    one, two = node.samples(values.reshape(*node.shape[:-2], *values.shape[-2:])).reshape(2, -1, *values.shape[-2:])
    if size is None:
        return one if torch.equal(one, two) else None
    index = one.long() - 1
    fits = torch.equal(one + size, two) and bool((index >= 0).all() and (index < size).all())
    return index if fits else None
