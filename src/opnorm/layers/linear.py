"""Linear layers: a matrix."""

from torch import nn

from opnorm.errors import InputShapeError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.weights import read_weight
from opnorm.operators import Dense


@register_layer(nn.Linear)
def linear(module: nn.Linear, input_shape: Shape | None) -> Dense:
    """Return the matrix. Leading axes of the input are a Kronecker product with an identity: the norm is the same.

    Raises:
        InputShapeError: if the last size is not the layer's number of features.
    """
    weight = read_weight(module)
    if input_shape is not None and (not input_shape or input_shape[-1] != weight.shape[1]):
        raise InputShapeError(
            f"{type(module).__name__} takes input_shape=(..., {weight.shape[1]}) without the batch, got {input_shape}"
        )
    return Dense(weight)
