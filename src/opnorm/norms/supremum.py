"""The supremum of a symbol over all frequencies: branch and bound over cells, every cell proved.

A cell with centre c on which `sum tau_i |w_i - c_i| <= a < pi/2` and that holds a maximiser gives
`M <= sigma(K^(c)) / cos a`, by the inequality of Bernstein and Szego. So M is at most the largest of these over cells
that cover the torus; the guide "Norms" has the proof. Cells where that is too much are divided.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.norms.autocorrelation import autocorrelation, autocorrelation_bytes
from opnorm.norms.blocks import attained_at, chunks, grid_maximum, symbol_above, symbol_below
from opnorm.norms.cells import Cover, cover
from opnorm.norms.stacks import ceilings, estimated_tops, grams, noise, oriented, prove_all
from opnorm.norms.symbol import Grid

_WIDEST = 0.45
_CLIMBS = 6
_SHARE = 0.95
"""Of the target, for the distance between frequencies; the rest is for rounding and for what a search misses."""
_SHARP = 1e-5
_TABLE_BYTES = 2**29
_PROMISING = 0.98
_FLAT = 0.7
"""The share of the coarsest cells that must look too large for them to be divided unproved."""


Grams = Callable[[Grid, Tensor], tuple[Tensor, Tensor]]
"""From a grid and some of its frequencies, shape (B, d), to the Gram matrices of the blocks and their errors."""


def supremum(grid: Grid, types: tuple[float, ...], *, rtol: float, slack: float, budget: int) -> tuple[float, float]:
    """Enclose `sup_w sigma(K^(w))` over all real frequencies, with proof.

    Args:
        grid: of stride 1, so fine that it proves the supremum up to `slack`: the way out where cells are too many.
        types: half the reach of the kernel along each axis.
        rtol: target for the gap.
        slack: what the distance between frequencies may cost where the budget does not last for the target.
        budget: about how many blocks to prove, all groups of a frequency counted as one.
    """
    target = _SHARE * min(rtol, slack) if any(types) else min(rtol, _SHARP)
    tiling = cover(types, grid.stride, _first_angle(_SHARE * slack), halved=not grid.kernel.is_complex())
    cells = tiling.centres().to(grid.kernel.device)
    source = _gram_source(grid)
    values = _estimates(source, replace(grid, sizes=tiling.sizes), cells).amax(1)
    gain = _climb(source, tiling, grid, cells[values.topk(min(2, len(cells))).indices])
    upper, seen, share, parts = 0.0, 0, 1.0, 2 ** sum(tau > 0 for tau in types)
    first = 0
    if any(types) and float((values.sqrt() > gain * _cosine_below(tiling.angle(0))).double().mean()) > _FLAT:
        first, cells = 1, tiling.divided(cells)
    for level in count(first):
        here = replace(grid, sizes=tiling.at_level(level))
        cosine = _cosine_below(tiling.angle(level))
        seen += len(cells)
        enough = cosine * (1 + slack) >= 1
        goal = symbol_below(grid, gain) * (1 + target) * cosine - grid.error
        # Where the budget will hardly last for another level, what is above the goal gets a bound while it is at hand.
        sweep = _sweep(source, here, cells, goal, thorough=enough and seen + parts * share * len(cells) > budget)
        upper = max(upper, rounding.div_up(symbol_above(grid, sweep.passed), cosine))
        if sweep.best is not None and sweep.best[2] > _PROMISING * gain * gain:
            gain = max(gain, attained_at(here, sweep.best[0], sweep.best[1])[0])
        if len(sweep.left) == 0:
            break
        share = len(sweep.left) / len(cells)
        if seen + parts * len(sweep.left) > budget:
            if enough:
                if not math.isfinite(sweep.rest):
                    sweep = _sweep(source, here, sweep.left, goal, thorough=True)
                upper = max(upper, rounding.div_up(symbol_above(grid, sweep.rest), cosine))
                break
            peak = grid_maximum(grid, _SHARP)
            return peak.lower, rounding.div_up(peak.upper, cosine_product_below(types, grid.sizes))
        cells = tiling.divided(sweep.left)
    return symbol_below(grid, gain), upper


def cosine_product_below(types: tuple[float, ...], sizes: tuple[int, ...]) -> float:
    """Return a lower bound of `prod cos(pi tau_i / N_i)`: what the supremum exceeds the maximum on a grid by."""
    value = 1.0
    for tau, n in zip(types, sizes, strict=True):
        # The quotient and the cosine are off by a few roundings each.
        value = rounding.mul_down(value, math.cos(math.pi * tau / n) - 8 * rounding.U) if tau else value
    return value


def _first_angle(target: float) -> float:
    """The widest angle from which halving leads to the one at which a flat symbol is done."""
    last = math.acos(1 / (1 + target))
    return last * 2.0 ** math.floor(math.log2(_WIDEST / last))


def _cosine_below(angle: float) -> float:
    """A lower bound of the cosine of an angle below pi/2, and 1 where there is but one frequency."""
    return math.cos(angle) - 8 * rounding.U if angle > 0.0 else 1.0


def _gram_source(grid: Grid) -> Grams:
    """By the autocorrelation of the taps, which is far cheaper, where that fits into memory."""
    if autocorrelation_bytes(grid) > _TABLE_BYTES:
        return lambda here, frequencies: grams(*oriented(*here.blocks(frequencies)))
    table = autocorrelation(grid)

    def source(here: Grid, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        found = table.grams(here, frequencies)
        return found, torch.full_like(found[:, 0, 0].real, table.error)

    return source


def _estimates(source: Grams, grid: Grid, frequencies: Tensor) -> Tensor:
    """About the squared norms of the blocks, shape (B, groups)."""
    found = [estimated_tops(source(grid, chunk)[0]) for chunk in chunks(grid, frequencies)]
    return torch.cat(found).reshape(len(frequencies), -1)


class _Sweep(NamedTuple):
    """What a pass over cells found, in squares of the computed blocks' norms."""

    passed: float  # the largest proved among the cells within the goal
    left: Tensor  # the other cells
    rest: float  # the largest proved among these; infinite unless thorough
    best: tuple[Tensor, int, float] | None  # the most promising of these: frequency, group, estimate


def _sweep(source: Grams, grid: Grid, cells: Tensor, goal: float, *, thorough: bool) -> _Sweep:
    """Prove that the blocks at the cells' centres are within the goal, or which are not."""
    groups = grid.kernel.shape[0]
    passed, rest, best, left = 0.0, 0.0 if thorough else math.inf, None, [cells[:0]]
    for chunk in chunks(grid, cells):
        gram, error = source(grid, chunk)
        proved = ceilings(gram, error, goal * abs(goal) - 4 * float(noise(gram, error).amax()))
        proved = proved.reshape(-1, groups).amax(1)
        fine = torch.isfinite(proved)
        passed = max(passed, float(proved[fine].amax())) if fine.any() else passed
        if fine.all():
            continue
        keep = (~fine).repeat_interleave(groups)
        gram, error = gram[keep], error[keep]
        left.append(chunk[~fine])
        values = estimated_tops(gram)
        top = int(values.argmax())
        if best is None or float(values[top]) > best[2]:
            best = left[-1][top // groups], top % groups, float(values[top])
        if thorough:
            rest = max(rest, prove_all(gram, error, float(values[top]), _SHARP)[0])
    return _Sweep(passed, torch.cat(left), rest, best)


def _climb(source: Grams, tiling: Cover, grid: Grid, cells: Tensor) -> float:
    """What is attained near some of the coarsest cells' centres; a search by halved steps, it proves no more."""
    unit = torch.eye(cells.shape[1], dtype=cells.dtype, device=cells.device)
    unit = unit[[tau > 0 for tau in tiling.types]]
    moves = torch.cat([0 * unit[:1], unit, -unit])
    doubled = torch.tensor([2 if tau else 1 for tau in tiling.types], device=cells.device)
    best = cells
    grid = replace(grid, sizes=tiling.sizes)
    for level in range(1, _CLIMBS + 1 if len(unit) else 1):
        grid = replace(grid, sizes=tiling.at_level(level))
        tried = (best * doubled)[:, None] + moves
        values = _estimates(source, grid, tried.flatten(0, 1))
        best = tried[torch.arange(len(tried)), values.amax(1).reshape(tried.shape[:2]).argmax(1)]
    values = _estimates(source, grid, best)
    top = int(values.argmax())
    groups = grid.kernel.shape[0]
    return attained_at(grid, best[top // groups], top % groups)[0]
