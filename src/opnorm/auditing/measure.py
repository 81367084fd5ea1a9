"""The numbers of one tensor: whether it is finite, its Frobenius norm, and the enclosure of its operator norm."""

import math

import torch
from torch import Tensor

from opnorm._enclosure import Enclosure, Guarantee
from opnorm.norms import norm
from opnorm.operators import Conv, LinearOperator

_CHUNK = 1 << 20
"""Elements that are held in float64 at a time."""


def frobenius(tensor: Tensor) -> float:
    """Return the Frobenius norm, computed in float64 piece by piece; NaN or inf where the tensor is not finite."""
    flat = tensor.reshape(-1)
    scale, total = 0.0, 0.0
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        wide = piece.to(torch.complex128 if piece.is_complex() else torch.float64).abs()
        peak = float(wide.amax())
        if not math.isfinite(peak):
            return math.nan
        if peak > scale:
            total *= (scale / peak) ** 2
            scale = peak
        if scale > 0.0:
            # Divided by the largest entry so far: squares neither overflow nor vanish.
            total += float(wide.div_(scale).square_().sum())
    return scale * math.sqrt(total)


def count_nonfinite(tensor: Tensor) -> tuple[int, int]:
    """Return how many entries are NaN and how many are infinite."""
    return int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())


def enclose(x: Tensor | LinearOperator, *, kernel: bool, rtol: float, guarantee: Guarantee) -> Enclosure:
    """Enclose the norm of a matrix, of an operator, or of the convolution with a kernel for every input size.

    Args:
        x: a matrix of shape (m, n), a kernel of shape (c_out, c_in, *taps), or an operator.
        kernel: whether a tensor is a kernel.
        rtol: a target for the gap.
        guarantee: what the upper end must hold.
    """
    if kernel and isinstance(x, Tensor):
        ones = (1,) * (x.dim() - 2)
        x = Conv(x, spatial=None, stride=ones, padding=((0, 0),) * len(ones), dilation=ones)
    return norm(x, rtol=rtol, guarantee=guarantee)


def stable_rank(frobenius_norm: float, upper: float) -> float:
    """Return `(|W|_F / upper)^2`, at most the stable rank; 0 for the zero matrix."""
    return (frobenius_norm / upper) ** 2 if upper > 0.0 else 0.0
