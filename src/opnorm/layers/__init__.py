"""From `nn.Module` to the linear map it applies: one file per family, and an open registry."""

from opnorm.layers import container, conv, embedding, linear, norm, padding, pooling, refused, shape, upsample
from opnorm.layers.matrices import matrices
from opnorm.layers.registry import register_layer, to_operator
from opnorm.layers.weights import read_weight

_RULES = (
    container,
    conv,
    embedding,
    linear,
    norm,
    padding,
    pooling,
    refused,
    shape,
    upsample,
)  # each registers its own

__all__ = ["matrices", "read_weight", "register_layer", "to_operator"]
