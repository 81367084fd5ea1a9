"""A matrix read in blocks of rows: widened and scaled where it is used, never as a whole."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.errors import WeightError
from opnorm.norms.attained import gain_below
from opnorm.norms.scaling import largest_part, widened

_BLOCK = 2**18
"""Elements that are widened at once: two megabytes stay in the processor's cache from one use to the next."""
_SAFE = 100
"""Weights between 2**-100 and 2**100 are not scaled: neither their squares nor sums of these leave float64."""


@dataclass(frozen=True, eq=False)
class Tall:
    """A matrix with at least as many rows as columns, as stored, and the power of two taken out of it."""

    stored: Tensor  # shape: (m, n), m >= n
    exponent: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.stored.shape
        return rows, columns

    def blocks(self) -> Iterator[Tensor]:
        """Yield blocks of rows over `2**exponent` in float64 or complex128; each is fresh and may be overwritten."""
        columns = self.shape[1]
        kind = torch.complex128 if self.stored.is_complex() else torch.float64
        for part in torch.split(self.stored, max(columns, _BLOCK // columns)):
            block = part.to(kind, copy=True).resolve_conj()
            if self.exponent:
                # In two steps, because 2**1074 itself is no float.
                half = -self.exponent // 2
                block.mul_(math.ldexp(1.0, half)).mul_(math.ldexp(1.0, -self.exponent - half))
            yield block


def tall(matrix: Tensor) -> Tall | None:
    """Return the matrix, or its adjoint if that has more rows; None if it is zero.

    Raises:
        WeightError: if it holds NaN or infinite values, or is not of a floating-point dtype.
    """
    matrix = matrix.detach()
    if not (matrix.is_floating_point() or matrix.is_complex()):
        widened(matrix)  # refuses
    largest = largest_part(matrix)
    if not math.isfinite(largest):
        raise WeightError("the weight holds NaN or infinite values; no norm encloses them")
    if largest == 0.0:
        return None
    exponent = math.frexp(largest)[1]
    stored = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mH
    return Tall(stored, exponent if abs(exponent) > _SAFE else 0)


def attained_by_rows(matrix: Tall, x: Tensor) -> float:
    """Return a proved lower bound of `|A x| / |x|` for x of shape (n,), float64 or complex128, of norm near one."""
    images, majorants = [], []
    for block in matrix.blocks():
        images.append(block @ x)
        modulus = block.abs() if block.is_complex() else block.abs_()
        majorants.append(modulus @ x.abs())
    constant = rounding.gamma(matrix.shape[1] + 8) * (8.0 if matrix.stored.is_complex() else 1.0)
    return gain_below(torch.cat(images), torch.cat(majorants), constant, x)


def cheap_bound_of_rows(matrix: Tall) -> float:
    """Return `min(|A|_F, sqrt(|A|_1 |A|_inf))`, rounded upward: a proved bound of the norm that needs no search."""
    rows, columns = matrix.shape
    column_sums = torch.zeros(columns, dtype=torch.float64, device=matrix.stored.device)
    energy, row_sum = 0.0, 0.0
    for block in matrix.blocks():
        modulus = block.abs() if block.is_complex() else block.abs_()
        column_sums += modulus.sum(0)
        row_sum = max(row_sum, float(modulus.sum(1).max()))
        energy = rounding.add_up(energy, float(torch.linalg.vector_norm(modulus).square()))
    slack = 1 + rounding.gamma(rows * columns + 16)
    # Squares of entries far below the largest underflow, and lose next to nothing.
    lost = rounding.mul_up(4.0 * rows * columns, rounding.TINY)
    frobenius = rounding.sqrt_up(rounding.add_up(rounding.mul_up(energy, slack), lost))
    sums = rounding.mul_up(float(column_sums.max()), row_sum, slack, slack)
    return min(frobenius, rounding.sqrt_up(sums))
