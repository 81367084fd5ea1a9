"""A strided, dilated kernel as a plain one over more channels: its polyphase components side by side.

With `o = r + s q` for each offset, `K^(w + 2 pi m / s) = sum_r exp(i w r) exp(2 pi i m r / s) P_r(s w)`, where
`P_r(t) = sum_q K_{r + s q} exp(i t q)`. So `[K^(w + 2 pi m / s)]_m / sqrt(s)` is `[P_r(s w)]_r` times a unitary matrix:
the same singular values, without the stride and from fewer and closer taps. Nothing is rounded.
"""

import math

import torch
from torch import Tensor


def polyphase(kernel: Tensor, offsets: Tensor, stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return a kernel and offsets whose symbol takes the same norms over all frequencies, with stride 1.

    Taps that are zero are left out, and so is what all offsets have in common: a start, and a factor on each axis.

    Args:
        kernel: shape (groups, c_out, c_in, taps), not zero.
        offsets: where each tap reads, integers, shape (taps, d).
        stride: per axis.

    Returns:
        Shapes (groups, c_out, c_in * phases, taps) and (taps, d); the least offset of each axis is 0.
    """
    kept = (kernel != 0).flatten(0, 2).any(0)
    kernel, offsets = kernel[..., kept], offsets[kept]
    steps = torch.tensor(stride, device=offsets.device)
    phases, phase = torch.unique(offsets % steps, dim=0, return_inverse=True)
    places, place = torch.unique(offsets // steps, dim=0, return_inverse=True)
    groups, c_out, c_in, _ = kernel.shape
    folded = kernel.new_zeros(groups, c_out, c_in, len(phases), len(places))
    folded[..., phase, place] = kernel
    places = places - places.amin(0)
    factors = [max(1, math.gcd(*axis)) for axis in places.mT.tolist()]
    return folded.flatten(2, 3), places // torch.tensor(factors, device=places.device)
