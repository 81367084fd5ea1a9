"""Stride, padding and dilation of a normalised convolution: the norm is of the map that they make of its weight."""

from typing import Any

from torch import nn

from opnorm.errors import ArgumentError
from opnorm.operators import Conv, ConvTranspose
from opnorm.parametrize.chains import rule_of
from opnorm.parametrize.views import View

_GEOMETRY = frozenset({"stride", "padding", "dilation", "groups", "padding_mode", "output_padding"})


def hold_geometry(module: nn.Module, name: str, view: View) -> None:
    """Let the layer's own class refuse another geometry, so that no forward has to look for one."""
    if name != "weight" or not isinstance(view.template, Conv | ConvTranspose):
        return
    cls: Any = type(module)
    plain = cls.__setattr__

    def __setattr__(self: nn.Module, key: str, value: Any) -> None:
        if key in _GEOMETRY and value != getattr(self, key, value) and rule_of(self, name) is not None:
            raise ArgumentError(
                f"{cls.__bases__[0].__name__}.weight is divided by its norm for {key}={getattr(self, key)}, and for "
                f"{value} it has another; call opnorm.remove_spectral_norm(layer), set {key}, then opnorm.spectral_norm"
            )
        plain(self, key, value)

    cls.__setattr__ = __setattr__
