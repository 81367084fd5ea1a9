"""Gram matrices with an a-priori bound of their rounding errors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.posdef import SQRT2
from opnorm.norms.attained import norm_above
from opnorm.norms.tall import Tall

_LARGE = 1024
"""Columns from which the library's own symmetric product pays."""
_STRIPS = 4


@dataclass(frozen=True)
class Gram:
    """A computed Gram matrix and how far it may be, in the spectral norm, from the exact one."""

    matrix: Tensor  # shape: (n, n), float64 or complex128; both triangles
    error: float
    energy: float
    """A bound of the squared Frobenius norm of A, and so of the spectral norm of `|A|^H |A|`."""


def gram_of_columns(matrix: Tall) -> Gram:
    """Return `A^H A` for `A` of shape (m, n).

    Each entry is an inner product of length m, so it is off by at most `gamma_m |A|^T |A|` in any order of summation
    (Higham, section 3.1; for complex arithmetic sqrt(2) gamma_2m), a matrix of spectral norm `gamma_m | |A| |^2`, and
    the squared Frobenius norm of A, which is the trace, bounds that of |A|.
    """
    m, n = matrix.shape
    total = _sum_of_products(matrix)
    diagonal = total.diagonal().real if total.is_complex() else total.diagonal()
    lost = rounding.mul_up(4.0 * n * m, rounding.TINY)
    energy = rounding.add_up(rounding.mul_up(float(diagonal.sum()), 1 + 2 * rounding.gamma(2 * m + n + 8)), lost)
    constant = rounding.mul_up(SQRT2, rounding.gamma(2 * m + 2)) if total.is_complex() else rounding.gamma(m + 1)
    return Gram(total, rounding.add_up(rounding.mul_up(constant, energy), lost), energy)


def attained_square(gram: Gram, x: Tensor) -> float:
    """Return a proved lower bound of the largest eigenvalue: the Rayleigh quotient at x, shape (n,), of norm near one.

    Its own rounding is at most `gamma_(2n+2) |x|^T |G| |x|`, and `|G| <= |A|^H |A|`.
    """
    quotient = float(torch.vdot(x, gram.matrix @ x).real)
    square = rounding.mul_up(norm_above(x), norm_above(x))
    factor = 8.0 if x.is_complex() else 1.0
    lost = rounding.mul_up(factor, rounding.gamma(2 * x.shape[0] + 8), rounding.add_up(gram.energy, gram.error), square)
    value = rounding.down(quotient - lost)
    return max(0.0, rounding.down(rounding.div_down(value, square) - gram.error)) if value > 0 else 0.0


def _sum_of_products(matrix: Tall) -> Tensor:
    """The sum of `B^H B` over the blocks B of rows, one triangle computed and mirrored.

    Large products on the CPU go to the symmetric product that NumPy calls for a matrix and its own transpose. Small
    ones stay with torch: two libraries that take turns keep each other's threads waiting.
    """
    n = matrix.shape[1]
    total: Tensor | None = None
    for block in matrix.blocks():
        if n >= _LARGE and block.device.type == "cpu" and not block.is_complex():
            array = block.numpy()
            product = torch.from_numpy(array.T @ array)
            total = product if total is None else total.add_(product)
        else:
            total = block.new_zeros(n, n) if total is None else total
            for first, end in _strips(n):
                total[first:end, :end].addmm_(block[:, first:end].mH, block[:, :end])
    assert total is not None  # a matrix without rows has no norm to prove
    for first, end in _strips(n):
        total[:first, first:end] = total[first:end, :first].mH
    return total


def _strips(n: int) -> Iterator[tuple[int, int]]:
    step = -(-n // _STRIPS)
    for first in range(0, n, step):
        yield first, min(first + step, n)


def cheap_bound(matrix: Tensor) -> float:
    """Return `min(|A|_F, sqrt(|A|_1 |A|_inf))`, rounded upward: a proved bound of the norm that needs no search."""
    modulus = matrix.abs()
    m, n = matrix.shape
    slack = 1 + rounding.gamma(m * n + 8)
    frobenius = rounding.mul_up(float(torch.linalg.vector_norm(modulus)), slack)
    columns = rounding.mul_up(float(modulus.sum(0).max()), slack)
    rows = rounding.mul_up(float(modulus.sum(1).max()), slack)
    # Squares of small entries may underflow in the Frobenius norm; the sums lose nothing.
    lost = rounding.mul_up(math.sqrt(4.0 * m * n), 2.0**-510)
    return min(rounding.add_up(frobenius, lost), rounding.sqrt_up(rounding.mul_up(columns, rows)))
