"""Padding layers: every result is one sample of the input, or nothing."""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from opnorm.errors import InputShapeError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.shapes import per_axis, refuse_missing, sizes_of
from opnorm.operators import Isometry, LinearOperator, Separable
from opnorm.operators.separable import Row

_MODES: dict[str, tuple[type[nn.Module], ...]] = {
    # A constant other than zero is a bias; the linear part is the padding with zeros.
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def padding(mode: str, dims: int, module: nn.Module, input_shape: Shape | None) -> LinearOperator:
    """Return the padding; without `input_shape` only where zeros are added, which keeps every length.

    Raises:
        InputShapeError: if `input_shape` does not fit, or is missing where the norm depends on it.
    """
    name = type(module).__name__
    flat = per_axis(module.padding, 2 * dims)  # type: ignore[arg-type] # a module's attributes are Tensor | Module
    if input_shape is None:
        if any(flat) and (mode != "constant" or min(flat) < 0):
            why = "it drops samples" if min(flat) < 0 else "padding repeats samples, as many as the size allows"
            refuse_missing(name, why, "input_shape=(channels, *sizes)")
        return Isometry(1)
    sizes = sizes_of(name, input_shape, None, dims)
    widths = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(dims))]  # torch names the last axis first
    try:
        axes = [(_samples(n, width, mode), n) for n, width in zip(sizes, widths, strict=True)]
    except RuntimeError as error:
        raise InputShapeError(f"{name} with padding {flat} does not take {input_shape}: {error}") from error
    return Separable.from_rows(input_shape[0], axes)


def _samples(n: int, width: tuple[int, int], mode: str) -> Sequence[Row]:
    """Rows with a one where torch takes the sample from, and empty rows for zeros."""
    positions = torch.arange(1.0, n + 1, dtype=torch.float64).reshape(1, 1, n)
    taken = F.pad(positions, width, mode=mode).flatten().int().tolist()
    return [{j - 1: Fraction(1)} if j else {} for j in taken]


for _mode, _classes in _MODES.items():
    for _dims, _cls in enumerate(_classes, start=1):
        register_layer(_cls)(partial(padding, _mode, _dims))
