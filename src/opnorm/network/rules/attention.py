"""Attention is not globally Lipschitz; on a bounded region its constant follows from the norms of its tokens."""

import math

from opnorm.graph import Node, Ref
from opnorm.network.rules.registry import Builder, register_rule, unsupported
from opnorm.network.rules.shape import gathered

_REASON = "attention is not globally Lipschitz (its scores are products); give a region"


@register_rule("aten.scaled_dot_product_attention.default")
def attention(node: Node, build: Builder) -> int:
    """Infinity outside a region: the scores are products of two varying tensors."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if isinstance(mask, Ref):
        raise unsupported(node, "its mask depends on the inputs")
    if dropout:
        raise unsupported(node, "its dropout is in training mode; call model.eval() first")
    query = build.shape(node.args[0])
    heads = {math.prod(build.shape(a)[:-2]) for a in node.args[:3]}
    if len(heads) != 1 or len(query) < 2:
        raise unsupported(node, "queries and keys must have as many heads")
    return build.opaque(node, tuple(build.source(a, node) for a in node.args[:3]), math.inf, _REASON)


@register_rule("opnorm.attention.default")
def recognised(node: Node, build: Builder) -> int:
    """Attention that was recognised in the graph; on a region it has a constant for each of its sources."""
    sources = tuple(build.source(a, node) for a in node.args[:3])
    return build.opaque(node, sources, math.inf, _REASON, kind="attention")


@register_rule("opnorm.rearranged.default")
def rearranged(node: Node, build: Builder) -> int:
    """Elements of one tensor in another layout."""
    x, before, index = node.args[:3]
    return gathered(node, build, build.source(x, node), index.reshape(-1), before.sample_shape)
