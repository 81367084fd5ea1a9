"""The proved norm of a matrix: Lanczos finds it, one Cholesky factorisation of `t I - A^H A` proves it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import eigenvalue_floor, require_ieee_arithmetic
from opnorm.norms.attained import attained_by_matrix
from opnorm.norms.gram import Gram, cheap_bound, gram_of_columns
from opnorm.norms.lanczos import lanczos
from opnorm.norms.memory import require_memory
from opnorm.norms.scaling import normalised

_SMALL = 192
"""Below it a full eigendecomposition costs less than a Krylov search."""
_SINGLE = 1024
"""From it on the search runs in float32, which halves what it reads; the proof does not depend on it."""
_DECOMPOSED = 1024
"""Up to it a full eigendecomposition is the answer to a search that fell short, as on the clusters of convolutions."""
_STEPS = 160
_CHEAP = 2**20
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
    require_memory(24 * side * side + 16 * matrix.numel(), f"the proof for a {tuple(matrix.shape)} matrix")
    scaled, exponent = normalised(matrix)
    tall = scaled if scaled.shape[0] >= scaled.shape[1] else scaled.mH.resolve_conj()
    if exponent == 0 and not tall.any():
        return Enclosure(0.0, slack, "proved", "zero", rtol)
    gram = gram_of_columns(tall)
    lower, ceiling = _search_and_prove(tall, gram, rtol)
    upper, method = rounding.sqrt_up(ceiling), "dense"
    if tall.numel() <= _CHEAP or ceiling == math.inf:
        # Exact for rank one, constant and permutation matrices, where the proof must keep a distance.
        upper, method = min((upper, method), (cheap_bound(tall), "entries"))
    # What scaling lost to underflow is far below one rounding of a bound of at least 1/2.
    upper = rounding.up(upper)
    lower, upper = rounding.ldexp_down(lower, exponent), rounding.ldexp_up(upper, exponent)
    if slack:
        lower, upper = max(0.0, rounding.down(lower - slack)), rounding.add_up(upper, slack)
    return Enclosure(lower, upper, "proved", method, rtol)


def _search_and_prove(tall: Tensor, gram: Gram, rtol: float) -> tuple[float, float]:
    """What is attained, and a proved ceiling of its square; a failed factorisation sends the search back to work."""
    lower = 0.0
    for vector in _candidates(gram.matrix, rtol):
        lower = max(lower, attained_by_matrix(tall, vector))
        ceiling = _ceiling(gram, lower * lower * (1 + _shift(gram, lower, rtol)))
        if ceiling < math.inf:
            return lower, ceiling
    shift = 10 * _shift(gram, lower, rtol)
    while ceiling == math.inf and shift < 100.0:
        ceiling = _ceiling(gram, lower * lower * (1 + shift))
        shift *= 10
    return lower, ceiling


def _shift(gram: Gram, attained: float, rtol: float) -> float:
    """How far above the attained square to factor, relative to it.

    A full eigendecomposition leaves only rounding in between; a search leaves a part of the target.
    """
    n = gram.matrix.shape[0]
    noise = gram.error + 4 * n * rounding.U * float(gram.matrix.diagonal().abs().sum())
    noise = 4 * noise / (attained * attained)
    return noise if n <= _SMALL else max(1.6 * rtol, noise)


def _candidates(gram: Tensor, rtol: float) -> Iterator[Tensor]:
    """Approximate top eigenvectors, shape (n,), of a positive semi-definite matrix, each better than the one before."""
    n = gram.shape[0]
    if n <= _SMALL:
        yield torch.linalg.eigh(gram).eigenvectors[:, -1]
        return
    narrow = n >= _SINGLE and rtol >= 1e-8
    searched = gram.to(torch.complex64 if gram.is_complex() else torch.float32) if narrow else gram
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(n, generator=generator, dtype=torch.float64).to(searched)
    start = searched[:, int(gram.diagonal().abs().argmax())] + searched.mean(1)
    start = start / torch.linalg.vector_norm(start) + noise / torch.linalg.vector_norm(noise)
    # The eigenvalue's relative error is twice the norm's; a tenth of the target leaves room for the shift.
    found = lanczos(lambda v: searched @ v, start, steps=_STEPS, tolerance=0.1 * rtol).vector.to(gram)
    yield found
    if n <= _DECOMPOSED:
        yield torch.linalg.eigh(gram).eigenvectors[:, -1]
    else:
        start = found + 1e-3 * noise.to(gram) / torch.linalg.vector_norm(noise)
        yield lanczos(lambda v: gram @ v, start, steps=2 * _STEPS, tolerance=1e-4 * rtol).vector


def _ceiling(gram: Gram, t: float) -> float:
    """A proved bound `lambda_max <= t + losses` by one factorisation of `t I - G`, or inf if it breaks down."""
    shifted = gram.matrix.neg()
    diagonal = shifted.diagonal()
    diagonal += t
    margin = float(eigenvalue_floor(shifted))
    if margin == -math.inf:
        return math.inf
    # Each diagonal entry of the shifted matrix is rounded once.
    largest = float(gram.matrix.diagonal().abs().max())
    rounded = rounding.mul_up(2 * rounding.U, rounding.add_up(t, largest))
    return rounding.add_up(t, -margin, gram.error, rounded)
