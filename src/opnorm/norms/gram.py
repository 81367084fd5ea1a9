"""Gram matrices with an a-priori bound of their rounding errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.posdef import SQRT2

_CHUNK = 2**22
"""Elements of a matrix that are multiplied at once."""


@dataclass(frozen=True)
class Gram:
    """A computed Gram matrix and how far it may be, in the spectral norm, from the exact one."""

    matrix: Tensor  # shape: (n, n), float64 or complex128; both triangles
    error: float


def gram_of_columns(matrix: Tensor) -> Gram:
    """Return `A^H A` for `A` of shape (m, n) with entries of absolute value below 1, float64 or complex128.

    Each entry is an inner product of length m, so it is off by at most `gamma_m |A|^T |A|` in any order of summation
    (Higham, section 3.1; for complex arithmetic sqrt(2) gamma_2m); the infinity norm bounds the spectral norm of
    that symmetric matrix.
    """
    m, n = matrix.shape
    first, *rest = torch.split(matrix, max(n, _CHUNK // max(1, n)))
    total = _product(first)
    for block in rest:
        total += _product(block)
    modulus = matrix.abs()
    reach = modulus.mT @ modulus.sum(1)
    largest = rounding.mul_up(float(reach.max()) if n else 0.0, 1 + rounding.gamma(m + n + 4))
    constant = rounding.mul_up(SQRT2, rounding.gamma(2 * m + 2)) if matrix.is_complex() else rounding.gamma(m + 1)
    error = rounding.add_up(rounding.mul_up(constant, largest), rounding.mul_up(4.0 * n * m, rounding.TINY))
    return Gram(total, error)


def _product(block: Tensor) -> Tensor:
    """`B^H B`; on the CPU by the symmetric product that NumPy calls for a matrix and its own transpose."""
    if block.is_complex() or block.device.type != "cpu":
        return block.mH @ block
    array = block.numpy()
    return torch.from_numpy(array.T @ array)


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
