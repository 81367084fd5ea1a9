"""Attention is not globally Lipschitz; on a bounded region its constant follows from the norms of its tokens."""

import math

from opnorm.graph import Node, Ref
from opnorm.network.rules.registry import Builder, register_rule, unsupported


@register_rule("aten.scaled_dot_product_attention.default")
def attention(node: Node, build: Builder) -> int:
    """Infinity outside a region: the scores are products of two varying tensors."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if isinstance(mask, Ref):
        raise unsupported(node, "its mask depends on the inputs")
    if dropout:
        raise unsupported(node, "its dropout is in training mode; call model.eval() first")
    query, key = build.shape(node.args[0]), build.shape(node.args[1])
    heads = {math.prod(build.shape(a)[:-2]) for a in node.args[:3]}
    if len(heads) != 1 or len(query) < 2:
        raise unsupported(node, "queries and keys must have as many heads")
    scale = node.kwargs.get("scale") or 1 / math.sqrt(query[-1])
    sources = tuple(build.source(a, node) for a in node.args[:3])
    reason = "attention is not globally Lipschitz (its scores are products); give a region"
    parameters = (
        float(query[-2]),
        float(key[-2]),
        float(query[-1]),
        float(build.shape(node.args[2])[-1]),
        float(scale),
    )
    return build.opaque(node, sources, math.inf, reason, "attention", parameters)
