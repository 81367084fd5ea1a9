"""Sequential: its layers one after the other."""

from torch import nn

from opnorm.errors import UnsupportedLayerError
from opnorm.layers.registry import Shape, register_layer, to_operator
from opnorm.layers.shape import identity
from opnorm.operators import Composed, LinearOperator


@register_layer(nn.Sequential)
def sequential(module: nn.Sequential, input_shape: Shape | None) -> LinearOperator:
    """Return the composition of the layers, all of which must be linear.

    Raises:
        UnsupportedLayerError: if a layer has no rule, or acts on the last axis of several; the message names it.
    """
    parts: list[LinearOperator] = []
    shape = input_shape
    for name, layer in module.named_children():
        try:
            part = to_operator(layer, shape)
        except UnsupportedLayerError as error:
            raise type(error)(f"in Sequential, layer {name}: {error}") from error
        if shape is not None:
            if part.in_shape != shape:
                raise UnsupportedLayerError(
                    f"in Sequential, layer {name}: {type(layer).__name__} acts on the last axis of {shape}; give an "
                    f"input_shape without the leading axes, or measure the layers one by one"
                )
            shape = part.out_shape
        parts.append(part)
    return Composed(tuple(parts)) if parts else identity(nn.Identity(), input_shape)
