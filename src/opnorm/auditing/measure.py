"""The numbers of one tensor: whether it is finite, its Frobenius norm, and the enclosure of its operator norm."""

import math

import torch
from torch import Tensor

from opnorm._enclosure import Enclosure, Guarantee
from opnorm.norms import norm
from opnorm.norms.scaling import largest_part
from opnorm.operators import Conv, LinearOperator

_CHUNK = 1 << 17
"""Elements that are held in float64 at a time: few enough to stay in the processor's cache."""
_SAFE = 2.0**400
"""Up to it, and from its inverse on, squares neither overflow nor vanish."""


def frobenius(tensor: Tensor) -> float:
    """Return the Frobenius norm, computed in float64 piece by piece; NaN where the tensor is not finite."""
    # Squares of what is narrower than float64 neither overflow nor vanish in it.
    wide = tensor.dtype in {torch.float64, torch.complex128}
    peak = largest_part(tensor) if wide else 1.0
    if not math.isfinite(peak) or peak == 0.0:
        return peak if peak == 0.0 else math.nan
    scale = 1.0 if 1 / _SAFE < peak < _SAFE else peak
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    total = 0.0
    for piece in torch.split(parts.reshape(-1), _CHUNK):
        part = piece.to(torch.float64) if scale == 1.0 else piece.to(torch.float64) / scale
        total += float(torch.dot(part, part))
    return scale * math.sqrt(total) if math.isfinite(total) else math.nan


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
