"""The lemma on which every proof rests: a completed Cholesky factorisation bounds the smallest eigenvalue.

If the floating-point factorisation of a Hermitian `A` completes with factor `L`, then `|A - L L^H| <= g |L| |L|^H`
entry by entry, so `lambda_min(A) >= -g |L|_F^2` (Higham, *Accuracy and Stability of Numerical Algorithms*, Theorem
10.3; Rump, *Verification of positive definiteness*, BIT 46, 2006). It holds for any order of summation, with or
without fused multiply-add, and for triangular solves by substitution.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.errors import ArithmeticModeError

SQRT2 = rounding.up(math.sqrt(2.0))


def eigenvalue_floor(matrix: Tensor) -> Tensor:
    """Return a proved lower bound of the smallest eigenvalue of each Hermitian matrix; -inf where Cholesky fails.

    Args:
        matrix: float64 or complex128, shape (..., n, n), taken as exact. Only the lower triangle is read. Entries
            must be scaled to the order of one, so that underflow is negligible, as its bound here assumes.

    Returns:
        float64, shape (...).
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    n = matrix.shape[-1]
    # Two roundings more than the theorem's n + 1 leave room for a division done as a product with a reciprocal.
    constant = SQRT2 * rounding.gamma(2 * n + 6) if matrix.is_complex() else rounding.gamma(n + 3)
    energy = squared_frobenius_above(factor)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).real if matrix.is_complex() else matrix.diagonal(dim1=-2, dim2=-1)
    underflow = 8 * n * n * rounding.TINY * (1 + diagonal.abs().amax(-1))
    loss = (constant * energy + underflow) * (1 + 8 * rounding.U)
    if matrix.device.type != "cpu":
        # Accelerators invert diagonal blocks instead of substituting: the residual is measured, not assumed.
        loss = loss * 2 + _residual_norm(matrix, factor)
    good = (info == 0) & torch.isfinite(loss)
    return torch.where(good, -loss, torch.full_like(loss, -math.inf))


def squared_frobenius_above(matrix: Tensor) -> Tensor:
    """Return an upper bound of the squared Frobenius norm of each matrix, shape (..., m, n) -> (...)."""
    parts = torch.view_as_real(matrix).flatten(-2) if matrix.is_complex() else matrix
    total = torch.linalg.vector_norm(parts, dim=(-2, -1)).square()
    terms = parts.shape[-1] * parts.shape[-2]
    return total * (1 + rounding.gamma(terms + 8)) * (1 + 4 * rounding.U)


def _residual_norm(matrix: Tensor, factor: Tensor) -> Tensor:
    """An upper bound of what `fl(A - L L^H)` measures of the Hermitian residual; its own rounding is in the caller's."""
    lower = torch.tril(matrix - factor @ factor.mH)
    row_sums = lower.abs().sum(-1) + lower.abs().sum(-2)
    return row_sums.amax(-1) * (1 + rounding.gamma(2 * matrix.shape[-1] + 16))


def require_ieee_arithmetic() -> None:
    """Refuse to prove anything while the processor flushes subnormal numbers to zero.

    Raises:
        ArithmeticModeError: if `torch.set_flush_denormal(True)` is in force.
    """
    smallest = torch.tensor([2.0**-1060], dtype=torch.float64)
    if float((smallest * 2.0).item()) == 0.0:
        raise ArithmeticModeError(
            "the processor flushes subnormal numbers to zero, which voids the error bounds of a proof; "
            "call torch.set_flush_denormal(False) first"
        )


def block_tridiagonal_floor(diagonal: Iterable[Tensor], below: Iterable[Tensor]) -> float:
    """Return a proved lower bound of the smallest eigenvalue of a block-tridiagonal matrix; -inf if Cholesky fails.

    The same lemma: an entry of `L L^H` sums over two block columns at most, so the constant counts their width only.

    Args:
        diagonal: Hermitian blocks, each of shape (n_i, n_i), float64 or complex128, scaled to the order of one.
        below: the blocks under them, shape (n_{i+1}, n_i); one less.
    """
    blocks, couplings = iter(diagonal), iter(below)
    current = next(blocks)
    energy, size, widest, largest = 0.0, 0, 0, 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(current)
        if int(info) != 0:
            return -math.inf
        largest = max(largest, float(current.diagonal().abs().max()))
        energy = rounding.add_up(energy, float(squared_frobenius_above(factor)))
        size, widest = size + factor.shape[0], max(widest, factor.shape[0])
        following = next(blocks, None)
        if following is None:
            break
        coupling = torch.linalg.solve_triangular(factor.mH, next(couplings), upper=True, left=False)
        energy = rounding.add_up(energy, float(squared_frobenius_above(coupling)))
        current = following - coupling @ coupling.mH
        largest = max(largest, float(following.diagonal().abs().max()))
    terms = 2 * widest + 8
    constant = rounding.mul_up(SQRT2, rounding.gamma(2 * terms)) if factor.is_complex() else rounding.gamma(terms)
    underflow = rounding.mul_up(16.0 * size * widest * (1 + largest), rounding.TINY)
    loss = rounding.add_up(rounding.mul_up(constant, energy), underflow)
    return -loss if math.isfinite(loss) else -math.inf
