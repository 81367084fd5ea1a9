"""Proofs for many small matrices at once: Gram matrices of blocks, and ceilings of their largest eigenvalues."""

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.posdef import eigenvalue_floor
from opnorm.norms.lanczos import batched_top

_ATTEMPTS = 12


def oriented(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Return the blocks or, where these are tall, their conjugate transposes: the smaller Gram matrix is B B^H."""
    if real.shape[1] <= real.shape[2]:
        return real, imag
    return real.mT.contiguous(), imag.mT.neg()


def grams(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Return `B B^H` for each `B = real + i imag` of shape (p, q), by real products, and a bound of each one's error.

    Real products run at several times the speed of complex ones. With D = |real| + |imag|, every entry is off by at
    most gamma_{2q+2} (D D^T), whose infinity norm bounds the spectral norm of the error.
    """
    q = real.shape[2]
    cross = torch.bmm(imag, real.mT)
    gram = torch.complex(torch.bmm(real, real.mT) + torch.bmm(imag, imag.mT), cross - cross.mT)
    modulus = real.abs() + imag.abs()
    reach = (modulus @ modulus.sum(1)[..., None]).amax((1, 2))
    slack = 1 + rounding.gamma(q + real.shape[1] + 6)
    underflow = 8.0 * q * real.shape[1] * rounding.TINY
    return gram, reach * (rounding.gamma(2 * q + 4) * slack) + underflow


def noise(gram: Tensor, error: Tensor) -> Tensor:
    """Return about what rounding takes from a proof, shape (B,)."""
    return 4 * gram.shape[1] * rounding.U * gram.diagonal(dim1=1, dim2=2).real.sum(1) + error


def prove_all(gram: Tensor, error: Tensor, level: float, rtol: float) -> tuple[float, int, float]:
    """Prove a ceiling of the largest eigenvalue of each matrix; those that exceed the level get a higher one.

    Returns:
        The largest ceiling, the position of the matrix with the largest eigenvalue found, and that value (0 where
        all stayed below the level).
    """
    lost = noise(gram, error)
    open_ = torch.arange(len(gram), device=gram.device)
    shift, ceiling, worst, value = 1.6 * rtol, 0.0, 0, 0.0
    for attempt in range(_ATTEMPTS):
        t = level * (1 + shift * max(1, attempt - 3)) + 4 * float(lost[open_].amax())
        proved = ceilings(gram[open_], error[open_], t)
        good = torch.isfinite(proved)
        ceiling = max(ceiling, float(proved[good].amax())) if good.any() else ceiling
        open_ = open_[~good]
        if len(open_) == 0:
            return ceiling, worst, value
        found = _largest(gram[open_])
        if found[1] > level:
            worst, value = int(open_[found[0]]), found[1]
            level = value
        else:
            shift *= 10
    # The trace bounds the largest eigenvalue whatever the search found.
    diagonal = gram.diagonal(dim1=1, dim2=2).real
    trace = float((diagonal.sum(1) + gram.shape[1] * error)[open_].amax())
    return max(ceiling, rounding.mul_up(trace, 1 + rounding.gamma(gram.shape[1] + 4))), worst, value


def estimated_tops(gram: Tensor) -> Tensor:
    """Return the largest Ritz values after a few steps, each a little below the largest eigenvalue, shape (B,)."""
    return batched_top(lambda v: gram @ v, gram.sum(2, keepdim=True) + 1e-3, steps=8)[0]


def _largest(gram: Tensor) -> tuple[int, float]:
    """The position and the value of about the largest eigenvalue among several matrices."""
    values, _ = batched_top(lambda v: gram @ v, gram.sum(2, keepdim=True) + 1e-3, steps=16)
    top = int(values.argmax())
    return top, float(torch.linalg.eigvalsh(gram[top])[-1])


def ceilings(gram: Tensor, error: Tensor, t: float) -> Tensor:
    """Return proved bounds of each largest eigenvalue, inf where `t I - G` did not factor."""
    shifted = gram.neg()
    diagonal = shifted.diagonal(dim1=1, dim2=2)
    reach = diagonal.abs().amax(1)
    diagonal += t
    lost = error - eigenvalue_floor(shifted) + 2 * rounding.U * (t + reach)
    return (t + lost) * (1 + 8 * rounding.U)
