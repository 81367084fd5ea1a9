"""The largest norm of the blocks of a symbol: a search over the grid, then a proof for every block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.posdef import squared_frobenius_above
from opnorm.norms.attained import attained
from opnorm.norms.lanczos import batched_top, lanczos
from opnorm.norms.stacks import grams, oriented, prove_all
from opnorm.norms.symbol import Grid
from opnorm.operators import Dense

_CHUNK_BYTES = 2**26
"""Blocks and their Gram matrices that stay in the processor's cache are proved half as fast again."""
_COARSE = 48
_LARGE = 128
"""Rows of a Gram matrix from which on a Krylov space is cheaper than all eigenvectors."""
_STEPS = 120


@dataclass(frozen=True, eq=False)
class Peak:
    """The enclosed maximum over the grid, in units of the scaled kernel, and where it is attained."""

    lower: float
    upper: float
    frequency: Tensor  # integers, shape: (d,)
    group: int
    vector: Tensor  # right singular vector of that block, shape: (c_in * aliases,)


def grid_maximum(grid: Grid, rtol: float) -> Peak:
    """Enclose `max_w sigma(block(w)) / sqrt(aliases)` over the grid, with proof.

    Args:
        grid: where to look.
        rtol: target for the gap.
    """
    frequency, group = find_peak(grid)
    lower, vector = attained_at(grid, frequency, group)
    level = lower * lower
    ceiling = 0.0
    for chunk in chunks(grid, grid.frequencies):
        gram, error = grams(*oriented(*grid.blocks(chunk)))
        proved, worst, value = prove_all(gram, error, level, rtol)
        ceiling = max(ceiling, proved)
        if value > level:
            groups = grid.kernel.shape[0]
            candidate = chunk[worst // groups], worst % groups
            found, direction = attained_at(grid, *candidate)
            if found > lower:
                lower, vector, (frequency, group) = found, direction, candidate
            level = max(level, lower * lower)
    return Peak(symbol_below(grid, lower), symbol_above(grid, ceiling), frequency, group, vector)


def symbol_below(grid: Grid, attained: float) -> float:
    """Return a lower bound of the exact symbol's norm, from one of a computed block's."""
    exact = rounding.div_down(attained, rounding.up(math.sqrt(grid.aliases))) if grid.aliases > 1 else attained
    return max(0.0, rounding.down(exact - grid.error))


def symbol_above(grid: Grid, ceiling: float) -> float:
    """Return an upper bound of the exact symbol's norm, from one of a computed block's square."""
    above = rounding.sqrt_up(ceiling)
    above = rounding.div_up(above, rounding.down(math.sqrt(grid.aliases))) if grid.aliases > 1 else above
    return rounding.add_up(above, grid.error)


def find_peak(grid: Grid) -> tuple[Tensor, int]:
    """Return the frequency and the group where the norm is about largest; a search, it proves nothing.

    Every few frequencies are looked at first, then the neighbours of the best.
    """
    every = grid.frequencies
    spans = [int(n) + 1 for n in every.amax(0)]
    pace = max(1, math.ceil((len(every) / _COARSE) ** (1 / len(spans))))
    coarse = every[(every % pace == 0).all(1)]
    values = estimates(grid, coarse)
    best = coarse[values.amax(1).topk(min(2, len(coarse))).indices]
    near = (every[:, None, :] - best[None]).abs().amax(-1).amin(-1) < pace
    fine = every[near]
    if pace > 1 and len(fine) <= 8 * _COARSE:
        coarse, values = fine, estimates(grid, fine)
    top = int(values.argmax())
    groups = grid.kernel.shape[0]
    return coarse[top // groups], top % groups


def largest_frobenius(grid: Grid) -> Tensor:
    """Return, for each group, an upper bound of the Frobenius norms of its computed blocks, shape (groups,)."""
    groups = grid.kernel.shape[0]
    most = torch.zeros(groups, dtype=torch.float64, device=grid.kernel.device)
    for chunk in chunks(grid, grid.frequencies):
        real, imag = grid.blocks(chunk)
        squares = squared_frobenius_above(real) + squared_frobenius_above(imag)
        most = torch.maximum(most, squares.reshape(-1, groups).amax(0))
    return most.sqrt() * (1 + 8 * rounding.U)


def estimates(grid: Grid, frequencies: Tensor) -> Tensor:
    """Return estimated squared norms of the blocks in single precision, shape (B, groups)."""
    found = []
    for chunk in chunks(grid, frequencies):
        real, imag = oriented(*grid.blocks(chunk, torch.float32))
        block = torch.complex(real, imag)
        start = block.sum(2, keepdim=True) + 0.5 * block[:, :, :1] + 1e-3
        values, _ = batched_top(lambda v, a=block: a @ (a.mH @ v), start, steps=8)  # type: ignore[misc]
        found.append(values.reshape(len(chunk), -1))
    return torch.cat(found)


def chunks(grid: Grid, frequencies: Tensor) -> Iterator[Tensor]:
    """Yield frequencies in pieces whose blocks and Gram matrices stay within a fixed memory."""
    rows, columns = grid.block_shape
    side = min(rows, columns)
    # Two parts of the block, their moduli, the Gram matrix in parts and as one, and its factor.
    cost = grid.kernel.shape[0] * 8 * (4 * rows * columns + 8 * side * side)
    yield from torch.split(frequencies, max(1, _CHUNK_BYTES // cost))


def attained_at(grid: Grid, frequency: Tensor, group: int) -> tuple[float, Tensor]:
    """Return a proved lower bound of the computed block's norm, and its right singular vector."""
    real, imag = (part[group] for part in grid.blocks(frequency[None]))
    block = torch.complex(real, imag)
    wide = block.shape[0] < block.shape[1]
    gram = block @ block.mH if wide else block.mH @ block
    if len(gram) < _LARGE:
        vector = torch.linalg.eigh(gram).eigenvectors[:, -1]
    else:
        vector = lanczos(lambda v: gram @ v, gram.sum(1) + 1e-3, steps=_STEPS, tolerance=1e-9).vector
    if wide:
        vector = block.mH @ vector
        norm = torch.linalg.vector_norm(vector)
        vector = vector / norm if norm > 0 else torch.ones_like(vector)
    return attained(Dense(block), vector), vector
