"""Gram matrices of a symbol at many frequencies, from the autocorrelation of its taps.

`K^(w) K^(w)^H = sum_d C_d exp(i w.d)` with `C_d = sum_{j - l = d} K_j K_l^H`: the products are formed once, and each
frequency only adds up a few matrices.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.norms.gram import cheap_bound
from opnorm.norms.symbol import PHASE_ERROR, Grid


@dataclass(frozen=True, eq=False)
class Autocorrelation:
    """Coefficients of the Gram matrices of the smaller side.

    Attributes:
        even: `C_d + C_d^H`, and C_0 first, shape (1 + lags, groups * p * p).
        odd: `i (C_d - C_d^H)`, shape (1 + lags, groups * p * p).
        lags: integers, one of each pair d, -d, and 0 first, shape (1 + lags, d).
        shape: (groups, p, p).
        error: how far, in the spectral norm, a computed Gram matrix may be from the exact one.
    """

    even: Tensor
    odd: Tensor
    lags: Tensor
    shape: tuple[int, int, int]
    error: float

    def grams(self, grid: Grid, frequencies: Tensor) -> Tensor:
        """Return `K^ K^H` at integer frequencies of the grid: (B, d) -> (B * groups, p, p), complex128."""
        waves = grid.phases(frequencies, self.lags)
        if self.even.is_complex():
            values = waves.real.to(self.even.dtype) @ self.even + waves.imag.to(self.even.dtype) @ self.odd
        else:
            values = torch.complex(waves.real @ self.even, waves.imag @ self.odd)
        return values.reshape(-1, *self.shape[1:])


def autocorrelation_bytes(grid: Grid) -> float:
    """About the memory that the coefficients take."""
    groups, rows, columns, taps = grid.kernel.shape
    spans: list[int] = (grid.offsets.amax(0) - grid.offsets.amin(0)).tolist()
    lags = min(taps * taps, math.prod(2 * span + 1 for span in spans)) / 2
    return 8.0 * 3 * lags * groups * min(rows, columns) ** 2 * (2 if grid.kernel.is_complex() else 1)


def autocorrelation(grid: Grid) -> Autocorrelation:
    """Return the coefficients for a kernel of stride 1.

    An entry of a Gram matrix is a sum of at most `taps**2 q` products of entries, q the longer side, each with a phase
    that is off by the phase's error; the lags are added up on top. In any order of summation it is off by at most that
    number of roundings times the same sum of moduli, `(sum_j |K_j|) (sum_j |K_j|)^T`, whose norm is the square of that
    of `sum_j |K_j|`.
    """
    kernel, offsets = grid.kernel, grid.offsets
    if kernel.shape[1] > kernel.shape[2]:
        kernel, offsets = kernel.transpose(1, 2).conj(), -offsets
    groups, p, q, taps = kernel.shape
    matrices = kernel.permute(3, 0, 1, 2).contiguous()  # shape: (taps, groups, p, q)
    pairs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for (j, first), (k, second) in product(enumerate(offsets.tolist()), repeat=2):
        pairs.setdefault(tuple(a - b for a, b in zip(first, second, strict=True)), []).append((j, k))
    lags = sorted(lag for lag in pairs if lag >= (0,) * offsets.shape[1])
    stack = torch.stack([_summed(matrices, pairs[lag]) for lag in lags])  # shape: (lags, groups, p, p)
    even, odd = stack + stack.mH, stack - stack.mH
    even[0] = stack[0]
    if kernel.is_complex():
        odd = odd * 1j
    spread = max(cheap_bound(total) for total in kernel.abs().sum(-1))
    spread = rounding.mul_up(spread, 1 + rounding.gamma(2 * taps + 8))
    roundings = rounding.add_up(rounding.gamma(2 * (taps * q + taps + 2 * len(lags)) + 16), 2 * PHASE_ERROR)
    # Real and imaginary part of a sum, and where the kernel is complex its own parts and products by three real ones.
    factor = 8.0 if kernel.is_complex() else 2.0
    error = rounding.mul_up(factor, roundings, spread, spread)
    underflow = 64.0 * (taps * taps * q + len(lags)) * p * rounding.TINY
    return Autocorrelation(
        even.flatten(1),
        odd.flatten(1),
        torch.tensor(lags, device=kernel.device),
        (groups, p, p),
        rounding.add_up(error, underflow),
    )


def _summed(matrices: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """`sum K_j K_k^H` over pairs (j, k) as one product."""
    first, second = (matrices[list(index)].permute(1, 2, 0, 3).flatten(2) for index in zip(*pairs, strict=True))
    return first @ second.mH
