"""From an approximate top eigenvector to a proved ceiling close above: factor, and search on with the factor."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.norms.lanczos import lanczos

_ATTEMPTS = 12
_STEPS = 16


@dataclass(frozen=True, eq=False)
class Factored:
    """A completed factorisation of `t I - G`.

    Attributes:
        ceiling: the proved bound of the largest eigenvalue of the exact G that follows from it.
        solve: applies the inverse of `t I - G` to a vector.
    """

    ceiling: float
    solve: Callable[[Tensor], Tensor]


def close_in(
    attained: Callable[[Tensor], float],
    factor: Callable[[float], Factored | None],
    vector: Tensor,
    *,
    shift: float,
) -> tuple[float, float]:
    """Return what is attained of a norm and a proved ceiling of its square, `shift` apart where possible.

    A factorisation that breaks down says that the search fell short. One further above succeeds, and its factor is an
    inverse to iterate with, which separates clusters that a Krylov search on G itself cannot.

    Args:
        attained: a proved lower bound of the norm at a vector.
        factor: the factorisation of `t I - G`, or None where it breaks down.
        vector: an approximate top eigenvector of G, shape (n,).
        shift: how far above the attained square to factor, relative to it.
    """
    lower, ceiling, reach = attained(vector), math.inf, shift
    for _ in range(_ATTEMPTS):
        factored = factor(lower * lower * (1 + reach))
        if factored is None:
            reach *= 30
            continue
        ceiling = min(ceiling, factored.ceiling)
        if reach <= shift:
            break
        vector = _iterate(factored.solve, vector)
        lower, reach = max(lower, attained(vector)), shift
    return lower, ceiling


def _iterate(solve: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """A better top eigenvector of G by a few steps of Lanczos on the inverse."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(vector)
    start = vector / torch.linalg.vector_norm(vector) + 0.1 * noise / torch.linalg.vector_norm(noise)
    return lanczos(solve, start, steps=_STEPS, tolerance=1e-12).vector
