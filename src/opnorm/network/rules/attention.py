"""Attention is not globally Lipschitz; on a bounded region see `regions`."""

import math

from opnorm.graph import Node
from opnorm.network.rules.registry import Builder, register_rule


@register_rule("aten.scaled_dot_product_attention.default")
def attention(node: Node, build: Builder) -> int:
    """Infinity outside a region: the scores are products of two varying tensors."""
    sources = tuple(dict.fromkeys(build.source(a, node) for a in node.args[:3]))
    reason = "attention is not globally Lipschitz (its scores are products); give a region"
    return build.opaque(node, sources, math.inf, reason)
