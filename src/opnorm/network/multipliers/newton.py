"""Newton's method on the whole network's matrix inequality: LipSDP's optimum, for up to about a thousand neurons.

With T = rho / S, xi = (dx, e_1, e_2, ...) and rows `r_i y_i = A_i xi`, the calculus proves `|out xi|^2 <= rho |dx|^2`
just where

    X(rho, T) = rho I_x + sum_k T_k (E_k - A_k^T A_k) - out^T out  >=  0.

The least rho is a semidefinite program. In its barrier `w rho - log det X` each unknown has a term of rank two, so that
the Hessian consists of products of entries of three matrices, and a step costs a few products of the size of X.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain, Stage
from opnorm.network.covariance import Forward, bound_squared, fixed, forward, ratio

_INFLATION = 1.3
_SHARPEN = 2.5  # small, because a long step ends near the boundary, where the next ones are short
_GAP = 2e-3
_DECREASE = 0.1
_BACKTRACK = 0.6
_SMALLEST_STEP = 1e-4
_SPEED = 1.2e10


@dataclass(frozen=True, eq=False)
class _Problem:
    """`X = sum_i z_i (p_i q_i^T + q_i p_i^T) / 2 - out^T out`, where z_i is the unknown `unknown[i]` of (rho, T).

    An element with one free part e and one row a has p = e - a and q = e + a: its two slope bounds. Products with
    these do not cancel where a bound is tight, as those with e and a would.
    """

    count: int
    p: Tensor  # shape: (terms, n)
    q: Tensor
    unknown: Tensor
    out: Tensor  # shape: (n_out, n)

    def matrix(self, point: Tensor) -> Tensor:
        """X, shape (n, n)."""
        half = self.p.mT @ (point[self.unknown, None] * self.q)
        return (half + half.mT) / 2 - self.out.mT @ self.out


def applies(chain: Chain) -> bool:
    """Whether the chain is of the form that the method needs: dense, one real block."""
    whole = all(isinstance(s, Stage) for s in chain.stages)
    return whole and bool(chain.choices) and chain.blocks == 1 and not chain.dtype.is_complex


def seconds_per_step(chain: Chain) -> float:
    """A rough price, to choose by."""
    size = chain.width + sum((len(s.free) + len(s.groups)) / 2 for s in chain.choices)
    return 1e-3 + 10 * size**3 / _SPEED


def newton(chain: Chain, begin: Forward, steps: int = 80, gap: float = _GAP, seconds: float | None = None) -> Forward:
    """Follow the barrier's central path from the multipliers of `begin` until L^2 is within `gap` of the optimum.

    Returns the best pass, or `begin` if it is no better. Needs `applies(chain)`.
    """
    started = time.monotonic()
    inner = _interior(chain, begin)
    scale = float(bound_squared(inner))
    if not (math.isfinite(scale) and scale > 0):
        return begin
    units = 1 / torch.cat(inner.multipliers)
    problem = _problem(chain, units, scale)
    point = torch.full((problem.count,), _INFLATION, dtype=torch.float64)  # rho, then T
    best, size = point, problem.out.shape[1]
    weight = size / (_INFLATION - 1)
    factor, info = torch.linalg.cholesky_ex(problem.matrix(point))
    for _ in range(0 if int(info) else steps):
        toward = _direction(problem, factor, weight)
        moved = _searched(problem, point, factor, weight=weight, toward=toward) if toward else None
        if toward is None or moved is None:
            break
        point, factor = moved
        best = point if point[0] < best[0] else best
        if toward[1] < 1:  # near the central path, where the duality gap is size / weight
            if size / weight < gap * float(point[0]):
                break
            weight *= _SHARPEN
        if seconds is not None and time.monotonic() - started > seconds:
            break
    multipliers = best[0] / (best[1:] * units)
    result = forward(chain, fixed(torch.split(multipliers, [s.count for s in chain.choices]), 1.0))
    return result if float(bound_squared(result)) < float(bound_squared(begin)) else begin


def _interior(chain: Chain, begin: Forward) -> Forward:
    """The same multipliers with some room where they were the smallest feasible ones."""
    given = begin.multipliers

    def choose(number: int, stage: Stage, b: Tensor) -> Tensor:
        margin = 1.05 if stage.decoupled else 1.02
        return given[number] * torch.clamp(ratio(stage, b, given[number]) * margin, min=1.0)

    return forward(chain, choose)


def _problem(chain: Chain, t: Tensor, rho: float) -> _Problem:
    """The inequality in units of rho for rho, of t for T, and of t^-1/2 for xi's free parts."""
    size = chain.width + sum(len(s.free) for s in chain.choices)
    identity = torch.eye(size, dtype=torch.float64)
    base = identity[: chain.width]
    p, q, unknown = [base], [base], [torch.zeros(chain.width, dtype=torch.int64)]
    at, count = chain.width, 0
    for stage in chain.choices:
        own, end = t[count : count + stage.count], at + len(stage.free)
        rows = own[stage.groups, None].sqrt() * (stage.spread.value[0] @ base)
        parts = identity[at:end]
        paired = torch.equal(stage.groups, stage.free_groups)
        p += [parts - rows] if paired else [parts, -rows]
        q += [parts + rows] if paired else [parts, rows]
        unknown += [g + count + 1 for g in ((stage.groups,) if paired else (stage.free_groups, stage.groups))]
        base = stage.mean.value[0] @ base
        base[stage.free, torch.arange(at, end)] += own[stage.free_groups].rsqrt()
        at, count = end, count + stage.count
    return _Problem(count + 1, torch.cat(p), torch.cat(q), torch.cat(unknown), chain.out.value[0] @ base / rho**0.5)


def _direction(problem: _Problem, factor: Tensor, weight: float) -> tuple[Tensor, float] | None:
    """The Newton direction of the barrier, and its decrement; None where it fails numerically.

    With D_k the derivative of X by the k-th unknown, the gradient is `-tr(X^-1 D_k)` and the Hessian
    `tr(X^-1 D_j X^-1 D_k)`.
    """
    half = torch.linalg.solve_triangular(factor, torch.cat([problem.p, problem.q]).mT, upper=False)
    p, q = half.tensor_split(2, 1)
    across = p.mT @ q
    gradient = -_summed(problem, across.diagonal()[:, None])[:, 0]
    gradient[0] += weight
    entries = ((p.mT @ p) * (q.mT @ q) + across * across.mT) / 2
    hessian = _summed(problem, _summed(problem, entries).mT.contiguous())
    root = hessian.diagonal().clamp_min(1e-300).rsqrt()
    balanced = hessian * root * root[:, None]
    lower, info = torch.linalg.cholesky_ex(balanced + 1e-14 * torch.eye(len(root), dtype=torch.float64))
    if int(info):
        return None
    direction = -root * torch.cholesky_solve((root * gradient)[:, None], lower)[:, 0]
    slope = -float(gradient @ direction)
    return (direction, math.sqrt(slope)) if math.isfinite(slope) and slope > 0 else None


def _summed(problem: _Problem, rows: Tensor) -> Tensor:
    """Sums over the terms of each unknown."""
    return rows.new_zeros(problem.count, rows.shape[1]).index_add(0, problem.unknown, rows)


def _searched(
    problem: _Problem, point: Tensor, factor: Tensor, *, weight: float, toward: tuple[Tensor, float]
) -> tuple[Tensor, Tensor] | None:
    """A step that stays inside and lowers the barrier enough, with its factor."""
    direction, decrement = toward
    value = _barrier(point, factor, weight)
    step = 1.0
    while step > _SMALLEST_STEP:
        moved = point + step * direction
        trial, info = torch.linalg.cholesky_ex(problem.matrix(moved))
        if not int(info) and _barrier(moved, trial, weight) <= value - _DECREASE * step * decrement**2:
            return moved, trial
        step *= _BACKTRACK
    return None


def _barrier(point: Tensor, factor: Tensor, weight: float) -> float:
    return weight * float(point[0]) - 2 * float(factor.diagonal().log().sum())
