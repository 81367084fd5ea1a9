"""Convolutions on a torus: their symbols at given frequencies, with a bound of the rounding error.

Frequencies are integers k per axis of a torus of T points, standing for the angles 2 pi k / T.
"""

import math

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.affine import Rows
from opnorm.certificate.network.maps import Convolution, Weights

_ROOT_ERROR = 16 * rounding.U
"""Error of a computed root of unity: its angle is at most 2 pi and is rounded twice, cos and sin once each."""


def roots(points: int) -> Tensor:
    """exp(2 pi i k / points) for k = 0, ..., points - 1, each off by at most `_ROOT_ERROR`."""
    angles = torch.arange(points, dtype=torch.float64) * (2 * math.pi) / points
    return torch.polar(torch.ones(points, dtype=torch.float64), angles)


def waves(frequencies: Tensor, positions: Tensor, torus: tuple[int, ...]) -> Tensor:
    """exp(i w . p) for all frequencies and positions.

    Args:
        frequencies: shape (f, d), integers.
        positions: shape (p, d), integers, negative ones included.
        torus: points per axis.

    Returns:
        Shape (f, p); each entry is a product of d roots of unity, off by at most `wave_error(d)`.
    """
    total = torch.ones(1, dtype=torch.complex128)
    for axis, points in enumerate(torus):
        index = (frequencies[:, axis, None] * positions[None, :, axis]) % points
        total = total * roots(points)[index]
    return total


def wave_error(dims: int) -> float:
    """The error of a product of `dims` computed roots of unity."""
    return dims * (_ROOT_ERROR + 4 * rounding.U) * (1 + 1e-6)


def taps(conv: Convolution) -> Tensor:
    """Where each tap reads relative to `stride * p`, shape (taps, d): `dilation * j - padding`."""
    axes = [
        d * torch.arange(k) - left for d, k, (left, _) in zip(conv.dilation, conv.kernel, conv.padding, strict=True)
    ]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def symbol(conv: Convolution, weights: Weights, frequencies: Tensor, torus: tuple[int, ...]) -> Rows:
    """`sum_j K_j exp(i w . (d j - pad))`, shape (f, c_out, c_in)."""
    kernel = ungrouped(conv.taps(weights), conv.groups)
    flat = kernel.flatten(2)  # shape: (c_out, c_in, taps)
    offsets = taps(conv)
    phase = waves(frequencies, offsets, torus)
    value = torch.einsum("oij,fj->foi", flat.to(torch.complex128), phase)
    count = flat.shape[-1]
    relative = wave_error(len(torus)) + 2 * rounding.gamma(count + 4) + conv.units * 2 * rounding.U
    error = flat.abs().sum(-1) * (relative * (1 + 1e-6))
    return Rows(value, error[None])


def ungrouped(kernel: Tensor, groups: int) -> Tensor:
    """The kernel of the same convolution with one group: zeros between the groups."""
    if groups == 1:
        return kernel
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    full = kernel.new_zeros(kernel.shape[0], inner * groups, *kernel.shape[2:])
    for g in range(groups):
        full[g * out : (g + 1) * out, g * inner : (g + 1) * inner] = kernel[g * out : (g + 1) * out]
    return full


def product(left: Rows, right: Rows) -> Rows:
    """The product of two matrices known up to errors, block by block."""
    inner = left.value.shape[-1]
    if right.error is None and _selects(right.value):
        # Every entry of the result is one entry of the left factor.
        value = left.value @ right.value.to(left.value.dtype)
        return Rows(value, None if left.error is None else left.error @ right.value.abs())
    value = left.value @ right.value
    relative = 3 * rounding.gamma(4 * inner + 16)
    size_l, size_r = left.value.abs(), right.value.abs()
    error = (size_l @ size_r) * relative
    if left.error is not None:
        error = error + left.error @ size_r
    if right.error is not None:
        widened = size_l if left.error is None else size_l + left.error
        error = error + widened @ right.error
    return Rows(value, error * (1 + rounding.gamma(4 * inner + 32)))


def _selects(value: Tensor) -> bool:
    nonzero = value != 0
    return bool((value[nonzero] == 1).all()) and int(nonzero.sum(-2).max()) <= 1
