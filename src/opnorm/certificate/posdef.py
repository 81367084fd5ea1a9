"""The lemma on which every proof rests: a completed Cholesky factorisation bounds the smallest eigenvalue.

If the floating-point factorisation of a Hermitian `A` completes with factor `L`, then `|A - L L^H| <= g |L| |L|^H`
entry by entry, so `lambda_min(A) >= -g |L|_F^2` (Higham, *Accuracy and Stability of Numerical Algorithms*, Theorem
10.3; Rump, *Verification of positive definiteness*, BIT 46, 2006). It holds for any order of summation, with or
without fused multiply-add, and for triangular solves by substitution.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
    return factor_with_floor(matrix)[1]


def factor_with_floor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor L beside `eigenvalue_floor`; where that is -inf the factor means nothing."""
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
    return factor, torch.where(good, -loss, torch.full_like(loss, -math.inf))


def squared_frobenius_above(matrix: Tensor) -> Tensor:
    """Return an upper bound of the squared Frobenius norm of each matrix, shape (..., m, n) -> (...)."""
    parts = torch.view_as_real(matrix).flatten(-2) if matrix.is_complex() else matrix
    total = torch.linalg.vector_norm(parts, dim=(-2, -1)).square()
    terms = parts.shape[-1] * parts.shape[-2]
    above: Tensor = total * (1 + rounding.gamma(terms + 8)) * (1 + 4 * rounding.U)
    return above


def _residual_norm(matrix: Tensor, factor: Tensor) -> Tensor:
    """An upper bound of what `fl(A - L L^H)` measures of the Hermitian residual; its own rounding is the caller's."""
    lower = torch.tril(matrix - factor @ factor.mH)
    row_sums = lower.abs().sum(-1) + lower.abs().sum(-2)
    bound: Tensor = row_sums.amax(-1) * (1 + rounding.gamma(2 * matrix.shape[-1] + 16))
    return bound


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


@dataclass(frozen=True, eq=False)
class BlockFactor:
    """The Cholesky factor of a block-tridiagonal matrix and what it proves of the smallest eigenvalue."""

    diagonal: list[Tensor]  # lower triangular, shape: (n_i, n_i)
    below: list[Tensor]  # shape: (n_{i+1}, n_i)
    floor: float


def factor_block_tridiagonal(diagonal: Iterable[Tensor], below: Iterable[Tensor]) -> BlockFactor | None:
    """Factor a Hermitian block-tridiagonal matrix and bound its smallest eigenvalue; None if Cholesky fails.

    The same lemma: an entry of `L L^H` sums over two block columns at most, so the constant counts their width only.

    Args:
        diagonal: Hermitian blocks, each of shape (n_i, n_i), float64 or complex128, scaled to the order of one.
        below: the blocks under them, shape (n_{i+1}, n_i); one less.
    """
    factors: list[Tensor] = []
    couplings: list[Tensor] = []
    energy, largest, residual, offered = 0.0, 0.0, 0.0, iter(below)
    for block in diagonal:
        largest = max(largest, float(block.diagonal().abs().max()))
        measured = block.device.type != "cpu"
        if factors:
            off = next(offered)
            coupling = torch.linalg.solve_triangular(factors[-1].mH, off, upper=True, left=False)
            couplings.append(coupling)
            energy = rounding.add_up(energy, float(squared_frobenius_above(coupling)))
            if measured:
                left = (off - coupling @ factors[-1].mH).abs()
                sums = torch.maximum(left.sum(0).max(), left.sum(1).max())
                residual = rounding.add_up(residual, 2 * float(sums) * (1 + 1e-9))
            block = block - coupling @ coupling.mH  # noqa: PLW2901 - the Schur complement takes its place
        factor, info = torch.linalg.cholesky_ex(block)
        if int(info) != 0:
            return None
        if measured:
            # Accelerators invert diagonal blocks instead of substituting: the residual is measured, not assumed.
            residual = rounding.add_up(residual, float(_residual_norm(block, factor)))
        factors.append(factor)
        energy = rounding.add_up(energy, float(squared_frobenius_above(factor)))
    widest = max(factor.shape[0] for factor in factors)
    terms = 2 * widest + 8
    complex_ = factors[0].is_complex()
    constant = rounding.mul_up(SQRT2, rounding.gamma(2 * terms)) if complex_ else rounding.gamma(terms)
    underflow = rounding.mul_up(16.0 * len(factors) * widest * widest * (1 + largest), rounding.TINY)
    doubled = 2.0 if measured else 1.0
    loss = rounding.add_up(rounding.mul_up(doubled, constant, energy), underflow, residual)
    return BlockFactor(factors, couplings, -loss) if math.isfinite(loss) else None
