"""The Fourier symbol of a convolution on a grid of frequencies, with a bound of its rounding error.

On the torus of `N` points an axis a convolution is block diagonal in the Fourier basis, with blocks
`K^(w) = sum_j K_j exp(i w . j)`; with stride `s` its blocks are `[K^(w + 2 pi m / s)]_m` side by side, over
`sqrt(prod s)` (Sedghi, Gupta & Long, *The singular values of convolutional layers*, ICLR 2019, for stride 1).
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.norms.gram import cheap_bound

# cos and sin of a rounded angle: three roundings of at most pi, and the function's own error.
PHASE_ERROR = 16 * rounding.U


@dataclass(frozen=True, eq=False)
class Grid:
    """The frequencies of a torus, and the kernel whose symbol is evaluated there.

    Attributes:
        kernel: float64 or complex128, entries below 1, shape (groups, c_out, c_in, taps).
        offsets: where each tap reads, integers, shape (taps, d).
        sizes: points of the torus per axis, each a multiple of the stride.
        stride: per axis.
    """

    kernel: Tensor
    offsets: Tensor
    sizes: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def aliases(self) -> int:
        """How many frequencies a strided convolution folds onto one."""
        return math.prod(self.stride)

    @cached_property
    def frequencies(self) -> Tensor:
        """Integer frequencies, shape (F, d): one of each alias class and, for real kernels, of each conjugate pair."""
        spans = [n // s for n, s in zip(self.sizes, self.stride, strict=True)]
        if not self.kernel.is_complex():
            spans[-1] = spans[-1] // 2 + 1
        axes = [torch.arange(span, device=self.kernel.device) for span in spans]
        return torch.cartesian_prod(*axes).reshape(-1, len(spans))

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one block."""
        _, c_out, c_in, _ = self.kernel.shape
        return c_out, c_in * self.aliases

    @cached_property
    def error(self) -> float:
        """How far, in the spectral norm, any computed block over `sqrt(aliases)` may be from the exact one."""
        taps = self.kernel.shape[-1]
        spread = max(cheap_bound(total) for total in self.kernel.abs().sum(-1))
        spread = rounding.mul_up(spread, 1 + rounding.gamma(taps + 2))
        factor = 4.0 if self.kernel.is_complex() else rounding.up(math.sqrt(2.0))
        return rounding.mul_up(factor, rounding.gamma(2 * taps + 2) + 2 * PHASE_ERROR, spread)

    def alias_frequencies(self, frequencies: Tensor) -> Tensor:
        """All frequencies that fold onto the given ones: (B, d) -> (B, aliases, d)."""
        steps = [n // s for n, s in zip(self.sizes, self.stride, strict=True)]
        shifts = [[m * step for m in range(s)] for step, s in zip(steps, self.stride, strict=True)]
        folded = torch.tensor(list(itertools.product(*shifts)), device=frequencies.device)  # shape: (aliases, d)
        return frequencies[:, None, :] + folded

    def phases(self, frequencies: Tensor, offsets: Tensor) -> Tensor:
        """`exp(2 pi i sum f_i j_i / N_i)` for integers f and j: (..., d), (taps, d) -> (..., taps), complex128."""
        common = math.lcm(*self.sizes)
        turns = torch.tensor([common // n for n in self.sizes], device=frequencies.device)
        # Reduced in integers, so that the angle is rounded once and is at most pi.
        residue = (frequencies * turns) @ offsets.mT % common
        residue = torch.where(2 * residue > common, residue - common, residue)
        angle = residue.to(torch.float64) * (math.tau / common)
        return torch.complex(torch.cos(angle), torch.sin(angle))

    def blocks(self, frequencies: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts of the blocks at some frequencies, not yet over `sqrt(aliases)`.

        Args:
            frequencies: integers, shape (B, d).
            dtype: float64, or float32 for a search.

        Returns:
            Two tensors of shape (B * groups, c_out, c_in * aliases); the group varies fastest.
        """
        groups, c_out, c_in, _ = self.kernel.shape
        phase = self.phases(self.alias_frequencies(frequencies), self.offsets)  # shape: (B, aliases, taps)
        if self.kernel.is_complex():
            real_part, imag_part = self.kernel.real, self.kernel.imag
            waves = torch.cat([torch.cat([phase.real, -phase.imag], -1), torch.cat([phase.imag, phase.real], -1)])
            weights = torch.cat([real_part, imag_part], -1)
        else:
            waves, weights = torch.cat([phase.real, phase.imag]), self.kernel
        table = weights.to(dtype).reshape(-1, weights.shape[-1])  # shape: (groups * c_out * c_in, taps)
        values = waves.to(dtype).reshape(-1, weights.shape[-1]) @ table.mT
        shape = (2, len(frequencies), self.aliases, groups, c_out, c_in)
        parts = values.reshape(shape).permute(0, 1, 3, 4, 2, 5)
        real, imag = parts.reshape(2, len(frequencies) * groups, c_out, self.aliases * c_in)
        return real, imag
