"""From `nn.Module` to the linear map it applies: one file per family, and an open registry."""

from opnorm.layers import conv, linear
from opnorm.layers.registry import register_layer, to_operator
from opnorm.layers.weights import read_weight

__all__ = ["conv", "linear", "read_weight", "register_layer", "to_operator"]
