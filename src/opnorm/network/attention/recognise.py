"""Attention in a graph: torch's own operation, and products around a softmax, in the layout of `scores`."""

import math
from dataclasses import replace
from typing import Any

import torch

from opnorm.graph import Graph, Node, Ref, Weight
from opnorm.network.attention.by_hand import Written, products
from opnorm.network.attention.scores import Scores, attend, rearranged

_BUILT_IN = "aten.scaled_dot_product_attention.default"
_PRODUCTS = frozenset({"aten.matmul.default", "aten.bmm.default", "aten.mm.default"})


def with_attention(graph: Graph) -> Graph:
    """The same graph with each attention that is recognised as nodes `opnorm.rearranged` and `opnorm.attention`."""
    nodes: list[Node] = []
    for node in graph.nodes:
        written = None
        if node.op == _BUILT_IN:
            written = _built_in(graph, node)
        elif node.op in _PRODUCTS and all(isinstance(a, Ref) for a in node.args[:2]):
            written = products(graph, node)
        nodes += [node] if written is None else _nodes(graph, node, written)
    return Graph(tuple(nodes), graph.inputs, graph.outputs, graph.weights, graph.derived, graph.labels)


def _nodes(graph: Graph, node: Node, written: Written) -> list[Node]:
    made = []
    names = []
    for part, name, index in zip(("queries", "keys", "values"), written.sources, written.indices[:3], strict=True):
        args: tuple[Any, ...] = (Ref(name), graph[name], index, None)
        names.append(f"{node.name} {part}")
        made.append(_node(node, names[-1], "opnorm.rearranged.default", rearranged, args, tuple(index.shape)))
    heads, queries, width = written.indices[3].shape
    whole = f"{node.name} whole"
    args = (*(Ref(name) for name in names), written.scores)
    made.append(_node(node, whole, "opnorm.attention.default", attend, args, (heads, queries, width)))
    back = torch.empty(written.indices[3].numel(), dtype=torch.int64)
    back[written.indices[3].reshape(-1)] = torch.arange(len(back))
    put: tuple[Any, ...] = (Ref(whole), made[-1], back, node)
    return [*made, replace(node, op="opnorm.rearranged.default", function=rearranged, args=put, kwargs={})]


def _node(node: Node, name: str, op: str, function: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> Node:
    return replace(
        node, name=name, op=op, function=function, args=args, kwargs={}, shape=(2, *shape), batch_axis=0, merged=1,
        inner=False,
    )  # fmt: skip


def _built_in(graph: Graph, node: Node) -> Written | None:
    """`scaled_dot_product_attention` as it is; None where its heads differ in number or its mask varies."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    varied = all(isinstance(a, Ref) for a in node.args[:3])
    if not varied or dropout or isinstance(mask, Ref) or node.kwargs.get("enable_gqa"):
        return None
    shapes = [graph[a.name].sample_shape for a in node.args[:3]]
    lead = shapes[0][:-2]
    if any(shape[:-2] != lead for shape in shapes) or node.batch_axis in (len(node.shape) - 1, len(node.shape) - 2):
        return None
    queries, keys, width = shapes[0][-2], shapes[1][-2], shapes[0][-1]
    bias = torch.zeros(*node.shape[:-2], queries, keys, dtype=torch.float64)
    if causal:
        bias.masked_fill_(torch.ones(queries, keys).triu(1) > 0, -math.inf)
    if isinstance(mask, Weight):
        stored = graph.weights[mask.name]
        bias = torch.where(stored, bias, -math.inf) if stored.dtype == torch.bool else bias + stored.double()
    each = node.samples(bias)
    if not torch.equal(each[0], each[1]):
        return None
    each = each[0].reshape(-1, queries, keys)
    scale = node.kwargs.get("scale")
    scales = torch.full(each.shape[:2], 1 / math.sqrt(width) if scale is None else float(scale), dtype=torch.float64)
    shapes = [*shapes, node.sample_shape]
    indices = [torch.arange(math.prod(s)).reshape(-1, *s[-2:]) for s in shapes]
    return Written(tuple(a.name for a in node.args[:3]), tuple(indices), Scores(scales, each, None))
