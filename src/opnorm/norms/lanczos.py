"""The Lanczos process with full reorthogonalisation: a search for the top eigenpair, which proves nothing by itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RitzPair:
    """The largest Ritz value of a Krylov space, with its vector of norm one."""

    value: float
    vector: Tensor  # shape: (n,)
    error: float
    """An estimate of how far `value` is below the largest eigenvalue: residual squared over the gap."""
    steps: int


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    tolerance: float,
    check_every: int = 6,
    passes: int = 2,
) -> RitzPair:
    """Return the top Ritz pair of a positive semi-definite map after at most `steps` applications.

    Args:
        matvec: the map on vectors of shape (n,).
        start: shape (n,), not zero; its dtype and device are those of the computation.
        steps: the largest dimension of the Krylov space.
        tolerance: stop when the estimated relative error of the Ritz value is below it.
        check_every: steps before the small eigenproblem is solved first, and at least between two times.
        passes: of the orthogonalisation. Twice is enough (Kahan) for a basis that is orthogonal to rounding, on which
            a stated probability rests; once does where the result is proved afterwards.
    """
    n = start.shape[0]
    steps = min(steps, n)
    basis = torch.empty(steps, n, dtype=start.dtype, device=start.device)
    alphas: list[float] = []
    betas: list[float] = []
    vector = start / torch.linalg.vector_norm(start)
    check = check_every
    for k in range(steps):
        basis[k] = vector
        spanned = basis[: k + 1]
        image = matvec(vector)
        along = spanned.conj() @ image
        alphas.append(float(along[k].real))
        image = torch.addmv(image, spanned.mT, along, alpha=-1)
        for _ in range(passes - 1):
            image = torch.addmv(image, spanned.mT, spanned.conj() @ image, alpha=-1)
        beta = float(torch.linalg.vector_norm(image))
        last = k + 1 == steps or beta <= 1e-30 * max(map(abs, alphas))
        if last or k + 1 >= check:
            # Later checks come less often: they cost more, and a step too many costs less beside those before.
            check = max(check + check_every, check * 4 // 3)
            value, coefficients, error = _top_of_tridiagonal(alphas, betas, beta, tolerance)
            if last or error <= tolerance * value:
                break
        betas.append(beta)
        vector = image / beta
    ritz = basis[: k + 1].mT @ coefficients.to(basis)
    return RitzPair(value, ritz / torch.linalg.vector_norm(ritz), error, k + 1)


def _top_of_tridiagonal(
    alphas: list[float], betas: list[float], beta: float, tolerance: float
) -> tuple[float, Tensor, float]:
    """The largest eigenvalue of the tridiagonal matrix, its vector, and the estimated error as an eigenvalue."""
    # Not by NumPy, whose threads would be awake and in the way of the factorisation that follows.
    small = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    small.diagonal(-1).copy_(torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64))
    values, vectors = torch.linalg.eigh(small)
    top = float(values[-1])
    residual = beta * abs(float(vectors[-1, -1]))
    # Values within the tolerance of the top count as the same cluster: any of its vectors serves.
    outside = values[values < top * (1 - tolerance / 4)]
    gap = top - float(outside[-1]) if len(outside) else top
    error = min(residual, residual * residual / gap) if gap > 0 else residual
    return top, vectors[:, -1], error


def batched_top(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Run Lanczos on a stack of positive semi-definite maps at once, each with its own start.

    Args:
        matvec: (batch, n, 1) -> (batch, n, 1).
        start: shape (batch, n, 1).
        steps: dimension of the Krylov spaces.

    Returns:
        The top Ritz values, shape (batch,), and their vectors, shape (batch, n, 1).
    """
    basis: list[Tensor] = []
    images: list[Tensor] = []
    kind = torch.finfo(start.dtype)
    vector = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    for _ in range(min(steps, start.shape[1])):
        basis.append(vector)
        images.append(matvec(vector))
        stack = torch.cat(basis, -1)  # shape: (batch, n, k)
        vector = images[-1]
        for _ in range(2):
            vector = vector - stack @ (stack.mH @ vector)
        size = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        # What rounding left of an exhausted space is no direction: zeros from there on.
        exhausted = size <= kind.eps * torch.linalg.vector_norm(images[0], dim=1, keepdim=True) + kind.tiny**0.5
        vector = torch.where(exhausted, 0, vector / size.clamp_min(kind.tiny))
    small = stack.mH @ torch.cat(images, -1)
    values, vectors = torch.linalg.eigh((small + small.mH) / 2)
    return values[:, -1], stack @ vectors[..., -1:]
