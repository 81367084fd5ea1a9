"""The largest norm of the blocks of a symbol: a search over the grid, then a proof for every block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.posdef import eigenvalue_floor, squared_frobenius_above
from opnorm.norms.attained import attained
from opnorm.norms.lanczos import batched_top
from opnorm.norms.symbol import Grid
from opnorm.operators import Dense

_CHUNK_BYTES = 2**26
"""Blocks and their Gram matrices that stay in the processor's cache are proved half as fast again."""
_COARSE = 48
_ATTEMPTS = 12


@dataclass(frozen=True, eq=False)
class Peak:
    """The enclosed maximum over the grid, in units of the scaled kernel, and where it is attained."""

    lower: float
    upper: float
    frequency: int  # position in grid.frequencies
    group: int
    vector: Tensor  # right singular vector of that block, shape: (c_in * aliases,)


def grid_maximum(grid: Grid, rtol: float) -> Peak:
    """Enclose `max_w sigma(block(w)) / sqrt(aliases)` over the grid, with proof.

    Args:
        grid: where to look.
        rtol: target for the gap.
    """
    frequency, group = find_peak(grid)
    lower, vector = _attained_at(grid, frequency, group)
    level = lower * lower
    ceiling = 0.0
    for index in _chunks(grid):
        real, imag = _oriented(*grid.blocks(index))
        gram, error = _gram(real, imag)
        proved, worst, value = _prove_all(gram, error, level, rtol)
        ceiling = max(ceiling, proved)
        if value > level:
            groups = grid.kernel.shape[0]
            candidate = (int(index[worst // groups]), worst % groups)
            found, direction = _attained_at(grid, *candidate)
            if found > lower:
                lower, vector, (frequency, group) = found, direction, candidate
            level = max(level, lower * lower)
    root = math.sqrt(grid.aliases)
    below = rounding.div_down(lower, rounding.up(root)) - grid.error if grid.aliases > 1 else lower - grid.error
    above = rounding.sqrt_up(ceiling)
    above = rounding.div_up(above, rounding.down(root)) if grid.aliases > 1 else above
    return Peak(max(0.0, rounding.down(below)), rounding.add_up(above, grid.error), frequency, group, vector)


def find_peak(grid: Grid) -> tuple[int, int]:
    """Return the frequency and the group where the norm is about largest; a search, it proves nothing.

    Every few frequencies are looked at first, then the neighbours of the best.
    """
    count = len(grid.frequencies)
    spans = [int(n) + 1 for n in grid.frequencies.amax(0)]
    dims = len(spans)
    pace = max(1, math.ceil((count / _COARSE) ** (1 / dims)))
    coarse = torch.arange(count, device=grid.frequencies.device)[(grid.frequencies % pace == 0).all(1)]
    values = _estimates(grid, coarse)
    best = coarse[values.amax(1).topk(min(2, len(coarse))).indices]
    near = (grid.frequencies[:, None, :] - grid.frequencies[best][None]).abs().amax(-1).amin(-1) < pace
    fine = near.nonzero().flatten()
    if pace > 1 and len(fine) <= 8 * _COARSE:
        coarse, values = fine, _estimates(grid, fine)
    top = int(values.argmax())
    groups = grid.kernel.shape[0]
    return int(coarse[top // groups]), top % groups


def largest_frobenius(grid: Grid) -> Tensor:
    """Return, for each group, an upper bound of the Frobenius norms of its computed blocks, shape (groups,)."""
    groups = grid.kernel.shape[0]
    most = torch.zeros(groups, dtype=torch.float64, device=grid.kernel.device)
    for chunk in _chunks(grid):
        real, imag = grid.blocks(chunk)
        squares = squared_frobenius_above(real) + squared_frobenius_above(imag)
        most = torch.maximum(most, squares.reshape(-1, groups).amax(0))
    return most.sqrt() * (1 + 8 * rounding.U)


def _estimates(grid: Grid, index: Tensor) -> Tensor:
    """Estimated squared norms of the blocks in single precision, shape (B, groups)."""
    found = []
    for chunk in _chunks(grid, index):
        real, imag = _oriented(*grid.blocks(chunk, torch.float32))
        block = torch.complex(real, imag)
        start = block.sum(2, keepdim=True) + 0.5 * block[:, :, :1] + 1e-3
        values, _ = batched_top(lambda v, a=block: a @ (a.mH @ v), start, steps=8)  # type: ignore[misc]
        found.append(values.reshape(len(chunk), -1))
    return torch.cat(found)


def _chunks(grid: Grid, index: Tensor | None = None) -> Iterator[Tensor]:
    """Positions of frequencies in pieces whose blocks and Gram matrices stay within a fixed memory."""
    rows, columns = grid.block_shape
    side = min(rows, columns)
    # Two parts of the block, their moduli, the Gram matrix in parts and as one, and its factor.
    cost = grid.kernel.shape[0] * 8 * (4 * rows * columns + 8 * side * side)
    index = torch.arange(len(grid.frequencies), device=grid.kernel.device) if index is None else index
    yield from torch.split(index, max(1, _CHUNK_BYTES // cost))


def _oriented(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks or, where these are tall, their conjugate transposes: the smaller Gram matrix is B B^H."""
    if real.shape[1] <= real.shape[2]:
        return real, imag
    return real.mT.contiguous(), imag.mT.neg()


def _gram(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """`B B^H` for each `B = real + i imag` of shape (p, q), by real products, and a bound of each one's error.

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


def _prove_all(gram: Tensor, error: Tensor, level: float, rtol: float) -> tuple[float, int, float]:
    """Prove a ceiling of the largest eigenvalue of each matrix; those that exceed the level get a higher one.

    Returns:
        The largest ceiling, the position of the matrix with the largest eigenvalue found, and that value (0 where
        all stayed below the level).
    """
    diagonal = gram.diagonal(dim1=1, dim2=2).real
    noise = 4 * gram.shape[1] * rounding.U * diagonal.sum(1) + error
    open_ = torch.arange(len(gram), device=gram.device)
    shift, ceiling, worst, value = 1.6 * rtol, 0.0, 0, 0.0
    for attempt in range(_ATTEMPTS):
        t = level * (1 + shift * max(1, attempt - 3)) + 4 * float(noise[open_].amax())
        proved = _ceilings(gram[open_], error[open_], t)
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
    trace = float((diagonal.sum(1) + gram.shape[1] * error)[open_].amax())
    return max(ceiling, rounding.mul_up(trace, 1 + rounding.gamma(gram.shape[1] + 4))), worst, value


def _largest(gram: Tensor) -> tuple[int, float]:
    """Position and value of about the largest eigenvalue among several matrices."""
    values, _ = batched_top(lambda v: gram @ v, gram.sum(2, keepdim=True) + 1e-3, steps=16)
    top = int(values.argmax())
    return top, float(torch.linalg.eigvalsh(gram[top])[-1])


def _ceilings(gram: Tensor, error: Tensor, t: float) -> Tensor:
    """Proved bounds of each largest eigenvalue, inf where `t I - G` did not factor."""
    shifted = gram.neg()
    diagonal = shifted.diagonal(dim1=1, dim2=2)
    largest = diagonal.abs().amax(1)
    diagonal += t
    lost = error - eigenvalue_floor(shifted) + 2 * rounding.U * (t + largest)
    return (t + lost) * (1 + 8 * rounding.U)


def _attained_at(grid: Grid, frequency: int, group: int) -> tuple[float, Tensor]:
    """A proved lower bound of the computed block's norm, and its right singular vector."""
    index = torch.tensor([frequency], device=grid.kernel.device)
    real, imag = (part[group] for part in grid.blocks(index))
    block = torch.complex(real, imag)
    wide = block.shape[0] < block.shape[1]
    gram = block @ block.mH if wide else block.mH @ block
    vector = torch.linalg.eigh(gram).eigenvectors[:, -1]
    if wide:
        vector = block.mH @ vector
        norm = torch.linalg.vector_norm(vector)
        vector = vector / norm if norm > 0 else torch.ones_like(vector)
    return attained(Dense(block), vector), vector
