"""Upsampling: interpolation axis by axis, with the weights that torch's formulas have in exact arithmetic."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor, prod

import torch
import torch.nn.functional as F
from torch import nn

from opnorm.errors import InputShapeError, UnsupportedLayerError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.shapes import refuse_missing, sizes_of
from opnorm.operators import Isometry, LinearOperator, Separable
from opnorm.operators.separable import Row

_DIMS = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}
_CUBIC = Fraction(-3, 4)  # torch's choice of the parameter of cubic convolution (Keys 1981)


@register_layer(nn.Upsample)
def upsample(module: nn.Upsample, input_shape: Shape | None) -> LinearOperator:
    """Return the interpolation; without `input_shape` only where each sample is repeated a fixed number of times.

    For "nearest" and "nearest-exact" the samples are those that torch takes, float32 rounding of the positions
    included. For the others the weights are those of the formulas in exact arithmetic; torch computes them in the
    dtype of the input.

    Raises:
        InputShapeError: if `input_shape` does not fit, or is missing where the norm depends on it.
        UnsupportedLayerError: if the mode is none of torch's.
    """
    name, mode = type(module).__name__, module.mode
    if input_shape is None:
        return _every_size(name, module)
    dims = _DIMS.get(mode, len(input_shape) - 1)
    sizes = sizes_of(name, input_shape, None, dims)
    if not 1 <= dims <= 3:
        raise InputShapeError(f"{name} takes input_shape=(channels, *sizes) with 1 to 3 sizes, got {input_shape}")
    targets, scales = _spread(module.size, dims), _spread(module.scale_factor, dims)
    if mode not in {"nearest", "nearest-exact", *_DIMS}:
        raise UnsupportedLayerError(f"{name} has the mode {mode!r}, which there is no rule for")
    rows = [_rows(n, target, scale, module) for n, target, scale in zip(sizes, targets, scales, strict=True)]
    return Separable.from_rows(input_shape[0], list(zip(rows, sizes, strict=True)))


def _rows(n: int, target: float | None, scale: float | None, module: nn.Upsample) -> Sequence[Row]:
    """The rows for one axis of n samples."""
    recompute = bool(module.recompute_scale_factor)
    outputs = floor(n * scale) if scale is not None else int(target or 0)
    if outputs < 1:
        raise InputShapeError(f"{type(module).__name__} leaves nothing of an axis of {n} samples")
    if module.mode in {"nearest", "nearest-exact"}:
        return _nearest(n, outputs, None if recompute else scale, module.mode)
    weights = _cubic if module.mode == "bicubic" else _linear
    return weights(n, outputs, None if recompute else scale, bool(module.align_corners))


def _spread(value: object, dims: int) -> tuple[float | None, ...]:
    """A size or scale factor for each axis."""
    if isinstance(value, tuple | list):
        if len(value) != dims:
            raise InputShapeError(f"Upsample with {value} takes input_shape=(channels, *sizes) with {len(value)} sizes")
        return tuple(value)
    return (value,) * dims  # type: ignore[return-value] # a number or None


def _nearest(n: int, outputs: int, scale: float | None, mode: str) -> Sequence[Row]:
    """Rows with a one where torch takes the sample from."""
    positions = torch.arange(n, dtype=torch.float64).reshape(1, 1, n)
    if scale is None:
        taken = F.interpolate(positions, size=outputs, mode=mode)
    else:
        taken = F.interpolate(positions, scale_factor=scale, mode=mode, recompute_scale_factor=False)
    return [{int(j): Fraction(1)} for j in taken.flatten().tolist()]


def _positions(n: int, outputs: int, scale: float | None, align: bool) -> list[Fraction]:
    """Where the outputs lie among the inputs."""
    if align:
        step = Fraction(n - 1, outputs - 1) if outputs > 1 else Fraction(0)
        return [step * i for i in range(outputs)]
    step = 1 / Fraction(scale) if scale is not None else Fraction(n, outputs)
    return [step * (i + Fraction(1, 2)) - Fraction(1, 2) for i in range(outputs)]


def _linear(n: int, outputs: int, scale: float | None, align: bool) -> Sequence[Row]:
    """Rows with the two weights of linear interpolation."""
    if outputs == n:  # torch copies, whatever the scale factor
        return [{i: Fraction(1)} for i in range(n)]
    rows = []
    for position in _positions(n, outputs, scale, align):
        inside = min(max(position, Fraction(0)), Fraction(n - 1))
        left = floor(inside)
        part = inside - left
        rows.append({left: 1 - part, left + 1: part} if part else {left: Fraction(1)})
    return rows


def _cubic(n: int, outputs: int, scale: float | None, align: bool) -> Sequence[Row]:
    """Rows with the four weights of cubic convolution; samples beyond the border are those at the border."""
    rows = []
    for position in _positions(n, outputs, scale, align):
        left = floor(position)
        row: dict[int, Fraction] = {}
        for tap in range(left - 1, left + 3):
            inside = min(max(tap, 0), n - 1)
            row[inside] = row.get(inside, Fraction(0)) + _cubic_weight(abs(position - tap))
        rows.append(row)
    return rows


def _cubic_weight(distance: Fraction) -> Fraction:
    a = _CUBIC
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance * distance + 1
    return ((distance - 5) * distance + 8) * distance * a - 4 * a


def _every_size(name: str, module: nn.Upsample) -> Isometry:
    """Each sample repeated a fixed number of times in each of a known number of axes."""
    known = 2 if isinstance(module, nn.UpsamplingNearest2d) else 0
    given = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,) * known
    # torch computes positions in float32, which is exact for powers of two.
    repeats = [scale for scale in (1, 2, 4, 8, 16) for wanted in given if wanted == scale]
    if module.mode in {"nearest", "nearest-exact"} and given and len(repeats) == len(given):
        return Isometry(prod(repeats))
    refuse_missing(name, "how often it takes a sample, and with what weight", "input_shape=(channels, *sizes)")
