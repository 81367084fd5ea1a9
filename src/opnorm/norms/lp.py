"""Norms between other spaces than l2: from lp to lq, of a matrix."""

import itertools
import math

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.errors import ArgumentError
from opnorm.norms.dense import dense_norm
from opnorm.norms.scaling import normalised

Order = tuple[float, float]
L1: Order = (1.0, 1.0)
L2: Order = (2.0, 2.0)
INFINITY: Order = (math.inf, math.inf)

_BOYD_STEPS = 60
_CORNERS: tuple[Order, ...] = ((1, 1), (2, 2), (math.inf, math.inf), (1, 2), (2, math.inf), (1, math.inf))


def parse_order(ord: float | tuple[float, float]) -> Order:
    """Return `(p_in, p_out)`, or refuse what is no norm.

    Raises:
        ArgumentError: if an order is below 1 or is NaN.
    """
    p, q = ord if isinstance(ord, tuple) else (ord, ord)
    if not (p >= 1 and q >= 1):
        raise ArgumentError(f"ord={ord!r}: the orders of an operator norm are numbers >= 1 or math.inf")
    return float(p), float(q)


def lp_norm(matrix: Tensor, order: Order, *, rtol: float) -> Enclosure:
    """Enclose `max |A x|_q / |x|_p` for `order = (p, q)`, with proof.

    Exact up to rounding: 1 -> 1 and inf -> inf (column and row sums), 1 -> q (the largest column norm), p -> inf (the
    largest dual row norm) for the orders 1, 2 and inf. In between, for p <= q, Riesz-Thorin interpolation of these
    gives the upper end and Boyd's power method the lower one.

    Args:
        matrix: shape (m, n).
        order: `(p_in, p_out)`.
        rtol: target for the gap.

    Raises:
        ArgumentError: for p > q, where over the reals the interpolation fails (Riesz's own condition).
    """
    p, q = order
    if order == L2:
        return dense_norm(matrix, rtol=rtol)
    if p > q:
        raise ArgumentError(
            f"the norm from l{p:g} to l{q:g} has no proved bound here: only orders with p_in <= p_out do"
        )
    scaled, exponent = normalised(matrix)
    if scaled.numel() == 0 or not scaled.any():
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    if order in _CORNERS:
        lower, upper = _corner(scaled, order, rtol)
        method = "entries"
    else:
        lower, upper = _boyd(scaled, order), _interpolated(scaled, order, rtol)
        method = "riesz-thorin"
    return Enclosure(rounding.ldexp_down(lower, exponent), rounding.ldexp_up(upper, exponent), "proved", method, rtol)


def _corner(matrix: Tensor, order: Order, rtol: float) -> tuple[float, float]:
    """Both ends of a norm that is read off the entries."""
    if order == L2:
        found = dense_norm(matrix, rtol=rtol)
        return found.lower, found.upper
    modulus = matrix.abs()
    match order:
        case (1, 1):
            value, terms = modulus.sum(0).max(), matrix.shape[0]
        case (1, 2):
            value, terms = torch.linalg.vector_norm(modulus, dim=0).max(), matrix.shape[0]
        case (2, math.inf):
            value, terms = torch.linalg.vector_norm(modulus, dim=1).max(), matrix.shape[1]
        case (math.inf, math.inf):
            value, terms = modulus.sum(1).max(), matrix.shape[1]
        case _:
            value, terms = modulus.max(), 0
    if terms == 0 and not matrix.is_complex():
        return float(value), float(value)
    slack = rounding.up(1 + rounding.gamma(terms + 8))
    return rounding.div_down(float(value), slack), rounding.mul_up(float(value), slack)


def _interpolated(matrix: Tensor, order: Order, rtol: float) -> float:
    """The least Riesz-Thorin bound over all triangles of corners that contain `(1/p, 1/q)`."""
    target = tuple(0.0 if math.isinf(v) else 1 / v for v in order)
    corners = [(c, tuple(0.0 if math.isinf(v) else 1 / v for v in c)) for c in _CORNERS]
    values = {c: _corner(matrix, c, rtol)[1] for c, _ in corners}
    best = math.inf
    for chosen in itertools.combinations(corners, 3):
        system = torch.tensor([[x, y, 1.0] for _, (x, y) in chosen], dtype=torch.float64).mT
        if abs(float(torch.linalg.det(system))) < 1e-9:
            continue
        shares = torch.linalg.solve(system, torch.tensor([*target, 1.0], dtype=torch.float64)).tolist()
        if min(shares) < -1e-14:
            continue
        # Shares are off by a few roundings; the logarithm of a value is at most 800.
        logs = math.fsum(max(0.0, s) * math.log(values[c]) for s, (c, _) in zip(shares, chosen, strict=True))
        best = min(best, rounding.up(math.exp(logs) * (1 + 1e-9)))
    return best


def _boyd(matrix: Tensor, order: Order) -> float:
    """What Boyd's power method attains, rounding subtracted (Linear Algebra Appl. 9, 1974)."""
    p, q = order
    dual = math.inf if p == 1 else p / (p - 1) if not math.isinf(p) else 1.0
    starts = [torch.ones_like(matrix[0]), matrix[int(matrix.abs().sum(1).argmax())].conj()]
    best = 0.0
    for start in starts:
        x = start / torch.linalg.vector_norm(start, p)
        for _ in range(_BOYD_STEPS):
            image = matrix.conj().mT @ _dual(matrix @ x, q)
            x = _dual(image, dual)
            x = x / torch.linalg.vector_norm(x, p)
        image, majorant = matrix @ x, matrix.abs() @ x.abs()
        # High powers of numbers well below one underflow: the largest is taken out first.
        scale = majorant.max()
        loss = rounding.gamma(2 * matrix.shape[1] + 8) * torch.linalg.vector_norm(majorant / scale, q) * scale
        scale = image.abs().max()
        gain = torch.linalg.vector_norm(image / scale, q) * scale - loss
        # Powers and roots of up to max(m, n) terms are each off by a few roundings.
        slack = 1 + 64 * rounding.gamma(max(matrix.shape))
        best = max(best, float(gain / torch.linalg.vector_norm(x, p)) / slack)
    return max(0.0, best)


def _dual(x: Tensor, p: float) -> Tensor:
    """The direction that attains `|x|_p` in the dual pairing."""
    modulus = x.abs()
    phase = torch.where(modulus > 0, x / modulus.clamp_min(1e-300), torch.zeros_like(x))
    if math.isinf(p):
        return phase * (modulus == modulus.max())
    return phase * modulus.div(modulus.max().clamp_min(1e-300)) ** (p - 1)
