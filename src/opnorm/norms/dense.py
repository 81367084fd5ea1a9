"""The proved norm of a matrix: Lanczos finds it, one Cholesky factorisation of `t I - A^H A` proves it."""

import math

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import factor_with_floor, require_ieee_arithmetic
from opnorm.norms.closing import Factored, close_in
from opnorm.norms.gram import Gram, attained_square, gram_of_columns
from opnorm.norms.lanczos import lanczos
from opnorm.norms.memory import require_memory
from opnorm.norms.tall import attained_by_rows, cheap_bound_of_rows, tall

_SMALL = 192
"""Below it a full eigendecomposition costs less than a Krylov search."""
_SINGLE = 1024
"""From it on the search runs in float32, which halves what it reads; the proof does not depend on it."""
_STEPS = 160
_CHEAP = 2**16
"""Up to so many elements the bounds read off the entries cost nothing beside the proof."""


def dense_norm(matrix: Tensor, *, rtol: float, slack: float = 0.0) -> Enclosure:
    """Enclose the spectral norm of a matrix of shape (m, n), with proof.

    Args:
        matrix: any floating-point or complex dtype.
        rtol: target for `upper / lower - 1`.
        slack: a bound of the spectral norm of what separates the matrix from the one that is meant.

    Raises:
        WeightError: if the matrix holds NaN or infinite values, or integers.
        TooLargeError: if the Gram matrix does not fit into memory.
    """
    require_ieee_arithmetic()
    if 0 in matrix.shape:
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    side = min(matrix.shape)
    require_memory(28 * side * side, f"the proof for a {tuple(matrix.shape)} matrix")
    rows = tall(matrix)
    if rows is None:
        return Enclosure(0.0, slack, "proved", "zero", rtol)
    gram = gram_of_columns(rows)
    vector = top_vector(gram.matrix, rtol)
    noise = gram.error + 4 * side * rounding.U * float(gram.matrix.diagonal().abs().sum())
    rounded = gram.error + rounding.gamma(2 * side + 8) * gram.energy
    by_gram = rounded < 0.01 * rtol * float(gram.matrix.diagonal().abs().max())
    lower, ceiling = close_in(
        # The Gram matrix is smaller than the weight, and its rounding too small to show.
        lambda v: rounding.sqrt_down(attained_square(gram, v)) if by_gram else attained_by_rows(rows, v),
        lambda t: _factored(gram, t),
        vector,
        shift=_shift(side, noise / float(gram.matrix.diagonal().abs().max()), rtol),
    )
    upper, method = rounding.sqrt_up(ceiling), "dense"
    if matrix.numel() <= _CHEAP or ceiling == math.inf:
        # Exact for rank one, constant and permutation matrices, where the proof must keep a distance.
        upper, method = min((upper, method), (cheap_bound_of_rows(rows), "entries"))
    # What scaling lost to underflow is far below one rounding of a bound of at least 1/2.
    upper = rounding.up(upper)
    lower, upper = rounding.ldexp_down(lower, rows.exponent), rounding.ldexp_up(upper, rows.exponent)
    if slack:
        lower, upper = max(0.0, rounding.down(lower - slack)), rounding.add_up(upper, slack)
    return Enclosure(lower, upper, "proved", method, rtol)


def top_vector(gram: Tensor, rtol: float) -> Tensor:
    """Return an approximate top eigenvector, shape (n,), of a positive semi-definite matrix; nothing is proved."""
    n = gram.shape[0]
    if n <= _SMALL:
        top: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -1]
        return top
    narrow = n >= _SINGLE and rtol >= 1e-8
    searched = gram.to(torch.complex64 if gram.is_complex() else torch.float32) if narrow else gram
    noise = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(searched)
    start = searched[:, int(gram.diagonal().abs().argmax())]
    start = start / torch.linalg.vector_norm(start) + noise / torch.linalg.vector_norm(noise)
    # The eigenvalue's relative error is twice the norm's; half of the target leaves room for the shift.
    return lanczos(lambda v: searched @ v, start, steps=_STEPS, tolerance=0.5 * rtol, passes=1).vector.to(gram)


def _shift(n: int, noise: float, rtol: float) -> float:
    """How far above the attained square to factor, relative to it.

    A full eigendecomposition leaves only rounding in between; a search leaves a part of the target.
    """
    return 4 * noise if n <= _SMALL else max(1.6 * rtol, 4 * noise)


def _factored(gram: Gram, t: float) -> Factored | None:
    """One factorisation of `t I - G` with the proved bound `lambda_max <= t + losses`, or None if it breaks down."""
    shifted = gram.matrix.neg()
    diagonal = shifted.diagonal()
    largest = float(diagonal.abs().max())
    diagonal += t
    factor, floor = factor_with_floor(shifted)
    margin = float(floor)
    if margin == -math.inf:
        return None
    # Each diagonal entry of the shifted matrix is rounded once.
    rounded = rounding.mul_up(2 * rounding.U, rounding.add_up(t, largest))
    ceiling = rounding.add_up(t, -margin, gram.error, rounded)

    def solve(v: Tensor) -> Tensor:
        return torch.cholesky_solve(v[:, None], factor)[:, 0]

    return Factored(ceiling, solve)
