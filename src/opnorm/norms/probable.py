"""Bounds from a random start: they need only applications, and fail with a stated probability."""

import math
import secrets
from collections.abc import Callable

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.norms.attained import attained
from opnorm.norms.lanczos import RitzPair, lanczos
from opnorm.norms.materialised import majorant_norm
from opnorm.norms.memory import require_memory
from opnorm.operators import LinearOperator

_ESTIMATE_STEPS = 60
_FAINT = 2.0**-200
"""A bound of the norm below which, beside weights of the order of one, the steps of Lanczos would underflow."""


def probable_norm(operator: LinearOperator, *, rtol: float, failure_probability: float = 1e-12) -> Enclosure:
    """Enclose the norm by Lanczos from a random start; the upper end fails with a stated probability.

    For `A >= 0` on R^n and a uniformly random unit start `b`, the largest Ritz value theta_k of the k-dimensional
    Krylov space satisfies `P(lambda_1 - theta_k > eps lambda_1) <= 1.596 sqrt(n) exp(-sqrt(eps) (2 k - 1))`: no gap of
    the spectrum is needed (after Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992). The start is drawn
    from the system's entropy, independent of the weights. The errors of the computed applications and of
    the orthogonalisation are added as a perturbation of `A`.

    Args:
        operator: with its weights scaled to the order of one.
        rtol: target for the gap; it fixes the number of steps, `log(1.6 sqrt(n) / p) / sqrt(8 rtol)`.
        failure_probability: over the random start.

    Raises:
        TooLargeError: if the Krylov basis does not fit into memory.
    """
    n = min(operator.in_size, operator.out_size)
    factor = 2 if operator.dtype.is_complex else 1
    steps = steps_needed(factor * n, rtol, failure_probability)
    require_memory(
        8 * factor * n * (min(steps, n) + 8),
        f"a Krylov basis of {min(steps, n)} vectors of {n} elements",
        "a larger rtol needs fewer vectors",
    )
    spread = majorant_norm(operator)
    if spread <= _FAINT:
        return Enclosure(0.0, spread, "proved", "entries" if spread else "zero", rtol)
    found, lower = _searched(operator, secrets.randbits(62), steps=steps, tolerance=0.0, check_every=steps)
    # Where the space is exhausted earlier, every later Krylov space is the same, so `steps` counts all the same.
    eps = epsilon(factor * n, steps, failure_probability)
    summed = operator.terms + operator.out_size + 16
    applied = rounding.gamma(summed) * spread * spread + summed * rounding.TINY
    wrong = 8 * (found.steps + 1) * (applied + rounding.gamma(n + found.steps + 16) * found.value) + found.error
    upper = rounding.sqrt_up(rounding.div_up(rounding.add_up(found.value, wrong), rounding.down(1 - eps)) + wrong)
    upper, method = min((rounding.up(upper), "lanczos"), (spread, "entries"))
    return Enclosure(min(lower, upper), upper, "probable", method, rtol, failure_probability)


def estimated_norm(operator: LinearOperator, *, rtol: float) -> Enclosure:
    """Estimate the norm by Lanczos: the lower end is attained, the upper end is what the residual suggests.

    Args:
        operator: with its weights scaled to the order of one.
        rtol: when to stop.
    """
    n = min(operator.in_size, operator.out_size)
    found, lower = _searched(operator, n, steps=_ESTIMATE_STEPS, tolerance=rtol)
    guess = math.sqrt(max(0.0, found.value + found.error)) * (1 + 1e-12)
    return Enclosure(lower, max(lower, guess), "estimate", "lanczos", rtol)


def steps_needed(n: int, rtol: float, failure_probability: float) -> int:
    """Return the steps after which the bound on the norm is within `rtol`, but for the failure probability."""
    wanted = min(0.99, 1 - 1 / (1 + 0.9 * rtol) ** 2)
    return math.ceil((math.log(1.596 * math.sqrt(n) / failure_probability) / math.sqrt(wanted) + 1) / 2)


def epsilon(n: int, steps: int, failure_probability: float) -> float:
    """Return the relative distance of the eigenvalue above the Ritz value, rounded up, after so many steps."""
    exponent = math.log(1.596 * math.sqrt(n) / failure_probability) * (1 + 1e-12) / (2 * steps - 1)
    return exponent * exponent * (1 + 1e-12)


def _searched(
    operator: LinearOperator, seed: int, *, steps: int, tolerance: float, check_every: int = 6
) -> tuple[RitzPair, float]:
    """The top Ritz pair from a normally distributed start, on the smaller side, and what its vector attains."""
    wide = operator.in_size <= operator.out_size
    kind = torch.complex128 if operator.dtype.is_complex else torch.float64
    n = min(operator.in_size, operator.out_size)
    start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=kind).to(operator.device)
    with torch.no_grad():
        found = lanczos(_gram(operator, wide), start, steps=steps, tolerance=tolerance, check_every=check_every)
        vector = found.vector if wide else operator.adjoint(found.vector.reshape(1, *operator.out_shape)).flatten()
        size = torch.linalg.vector_norm(vector)
    return found, attained(operator, (vector / size).reshape(operator.in_shape)) if size > 0 else 0.0


def _gram(operator: LinearOperator, wide: bool) -> Callable[[Tensor], Tensor]:
    """`A^H A` or `A A^H`, whichever acts on fewer numbers."""

    def on_input(v: Tensor) -> Tensor:
        return operator.adjoint(operator.apply(v.reshape(1, *operator.in_shape))).flatten()

    def on_output(v: Tensor) -> Tensor:
        return operator.apply(operator.adjoint(v.reshape(1, *operator.out_shape))).flatten()

    return on_input if wide else on_output
