"""The largest singular triple of a convolution, tracked at a frequency that moves.

At a frequency w the convolution is the matrix K(w). The frequency goes to where the current left vectors see the
largest gain, which is a trigonometric polynomial of as many terms as pairs of taps. As maxima are many, and another
one may overtake, a vector is kept at each frequency of a grid; a few of these scouts advance in every step.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm.parametrize.blocks import (
    Block,
    Triple,
    iterate,
    multiply,
    normalised,
    random_like,
    ritz_rotation,
    unit_columns,
)
from opnorm.parametrize.views import View

SCOUTS_A_STEP = 4


class Tables(NamedTuple):
    """What depends on the geometry alone."""

    positions: Tensor  # shape: (taps, axes)
    residues: Tensor  # shape: (taps,)
    count: int  # of residues
    grid: Tensor  # shape: (scouts, axes)
    grid_phases: Tensor  # shape: (taps, scouts)
    fine: Tensor  # shape: (candidates, axes)
    fine_phases: Tensor  # shape: (candidates, taps)
    pairs: Tensor  # shape: (taps, taps): whether two taps share a residue
    differences: Tensor  # shape: (taps, taps, axes): p_l - p_j for the entry (j, l)


def tables(view: View, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the constants of a geometry in a real dtype."""
    return _tables(view.positions, view.residues, view.strides, view.template.dtype.is_complex, dtype, device)


@lru_cache(maxsize=128)
def _tables(
    positions: tuple[tuple[int, ...], ...],
    residues: tuple[int, ...],
    strides: tuple[int, ...],
    is_complex: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    places = torch.tensor(positions, dtype=dtype, device=device)
    classes = torch.tensor(residues, device=device)
    spans = tuple(max(axis) for axis in zip(*positions, strict=True))
    grid = _grid(spans, strides, 1, half=not is_complex).to(device, dtype)
    fine = _grid(spans, strides, 2, half=not is_complex).to(device, dtype)
    return Tables(
        places,
        classes,
        max(residues) + 1,
        grid,
        _phases(places, grid).mT,
        fine,
        _phases(places, fine),
        classes[:, None] == classes[None, :],
        places[None, :] - places[:, None],
    )


def _grid(spans: tuple[int, ...], strides: tuple[int, ...], per_tap: int, *, half: bool) -> Tensor:
    """Frequencies that cover what differs, for a real kernel half of it, shape (count, axes).

    A frequency and its shift by a multiple of 2 pi / stride are the same map, up to a rotation.
    """
    steps = []
    for span, stride in zip(spans, strides, strict=True):
        count = min(max(2, per_tap * -(-(span + 1) // stride) + 1), 16)
        steps.append([2 * torch.pi * i / (stride * count) for i in range(count)])
    kept = [row[: len(row) // 2 + 1] if half and axis == 0 else row for axis, row in enumerate(steps)]
    return torch.tensor(list(product(*kept)), dtype=torch.float64).reshape(-1, len(spans))


def _phases(positions: Tensor, omega: Tensor) -> Tensor:
    """`exp(i w.p_j)`, shape (..., taps)."""
    angle = omega @ positions.mT
    return torch.polar(torch.ones_like(angle), angle)


def step(view: View, matrices: Tensor, block: Block, turn: int | None = None) -> tuple[Block, Triple]:
    """Advance the block by one iteration and return the best triple that it holds.

    `matrices` has shape (blocks, rows, columns * taps). `turn` says which scouts advance; None: all of them.
    """
    table = tables(view, block.omega.dtype, block.omega.device)
    width, total = block.y.shape[-1], block.scouts.shape[-1]
    first = 0 if turn is None else turn * SCOUTS_A_STEP % max(total, 1)
    last = total if turn is None else min(first + SCOUTS_A_STEP, total)
    here = _phases(table.positions, block.omega)[:, None, :, None]
    there = table.grid_phases[:, first:last]
    lifted = _spread(table, block.y, here)
    if last > first:
        lifted = torch.cat([lifted, _spread(table, block.scouts[..., first:last], there)], -1)
    images = multiply(matrices, lifted)
    left = torch.linalg.qr(images[..., :width])[0]
    both = torch.cat([left, unit_columns(images[..., width:])], -1)
    pulled = multiply(matrices.mH, both)  # shape: (blocks, columns * taps, width + advancing scouts)
    rotation = ritz_rotation(_gather(table, pulled[..., :width], here))
    main, left = pulled[..., :width] @ rotation, left @ rotation
    scouts = block.scouts
    if last > first:
        advanced, gains = normalised(_gather(table, pulled[..., width:], there))
        scouts = torch.cat([scouts[..., :first], advanced, scouts[..., last:]], -1)
        guest = gains.argmax(-1, keepdim=True)
        seen = _take(pulled[..., width:], guest)
        places = torch.stack([block.omega, table.grid[first + guest[:, 0, 0]]], 1)
        omega = _best_frequency(view, table, torch.cat([main[..., :1], seen], -1), places, local=False)
        # The scout that sees most takes the place of the weakest vector.
        main = torch.cat([main[..., : max(1, width - 1)], seen], -1)
        left = torch.cat([left[..., : max(1, width - 1)], _take(both[..., width:], guest)], -1)
    else:
        omega = _best_frequency(view, table, main[..., :1], block.omega[:, None], local=True)
    here = _phases(table.positions, omega)[:, None, :, None]
    y, lengths = normalised(_gather(table, main, here))
    order = lengths.argsort(-1, descending=True)
    y = y.gather(-1, order.expand_as(y))[..., :width]
    return Block(y, omega, scouts), Triple(
        lengths.amax((1, 2)), *_direction(_take(left, order[..., :1]), _spread(table, y[..., :1], here), matrices)
    )


def _take(columns: Tensor, index: Tensor) -> Tensor:
    """One column of each block, (blocks, n, width), (blocks, 1, 1) -> (blocks, n, 1)."""
    return columns.gather(-1, index.expand(-1, columns.shape[1], 1))


def _direction(left: Tensor, lifted: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`Re(left^H W lifted)` as an inner product with a real weight of rank two."""
    if matrices.is_complex():
        return left, lifted
    return torch.cat([left.real, left.imag], -1), torch.cat([lifted.real, lifted.imag], -1)


def _spread(table: Tables, y: Tensor, phases: Tensor) -> Tensor:
    """Spread y over the taps: (blocks, columns * residues, width) -> (blocks, columns * taps, width)."""
    spread = y.unflatten(1, (-1, table.count))
    if table.count > 1:
        spread = spread[:, :, table.residues]
    return (spread * phases).flatten(1, 2)


def _gather(table: Tables, z: Tensor, phases: Tensor) -> Tensor:
    """The adjoint of `_spread`."""
    turned = z.unflatten(1, (-1, len(table.residues))) * phases.conj()
    if table.count == 1:
        return turned.sum(2)
    sums = turned.new_zeros(*turned.shape[:2], table.count, turned.shape[3])
    return sums.index_add(2, table.residues, turned).flatten(1, 2)


def _best_frequency(view: View, table: Tables, pulled: Tensor, current: Tensor, *, local: bool) -> Tensor:
    """The frequency at which one of the left vectors is seen with the largest gain.

    For the left vector u, `|K(w)^H u|^2 = sum_jl M_jl exp(i w.(p_l - p_j))` with M the Gram matrix of the taps,
    restricted to pairs of one residue. Tried are `current`, shape (blocks, n, axes), and unless `local` a fine grid.
    """
    taps = pulled.unflatten(1, (-1, len(table.residues))).permute(0, 3, 2, 1)  # shape: (blocks, width, taps, columns)
    largest = taps.abs().amax((1, 2, 3), keepdim=True)
    taps = taps / torch.where(largest > 0, largest, torch.ones_like(largest))
    gram = (taps @ taps.mH) * table.pairs
    gains = _gains(gram, _phases(table.positions, current)[:, None])  # shape: (blocks, width, candidates)
    candidates = current
    if not local:
        gains = torch.cat([gains, _gains(gram, table.fine_phases)], -1)
        candidates = torch.cat([current, table.fine.expand(len(current), -1, -1)], 1)
    best = gains.flatten(1).argmax(1)
    row = torch.arange(len(current), device=current.device)
    chosen = gram[row, best // gains.shape[2]]
    refined = _newton(table, chosen, candidates[row, best % gains.shape[2]])
    return _snap(view, table, chosen, refined) if view.torus else refined


def _gains(gram: Tensor, phases: Tensor) -> Tensor:
    """The squared gain at each candidate: (..., taps, taps), (..., n, taps) -> (..., n)."""
    return ((phases.conj() @ gram) * phases).sum(-1).real


def _newton(table: Tables, gram: Tensor, omega: Tensor) -> Tensor:
    """One Newton step towards the nearest maximum, kept only where it does not lose."""
    phases = _phases(table.positions, omega)
    terms = gram * phases.conj()[:, :, None] * phases[:, None, :]
    slope = torch.einsum("bjl,jla->ba", -terms.imag, table.differences)
    bend = torch.einsum("bjl,jla,jlc->bac", terms.real, table.differences, table.differences)
    # The Hessian is -bend; damped to be safely invertible where the gain does not bend along some axis.
    size = bend.diagonal(dim1=1, dim2=2).abs().amax(1) + torch.finfo(omega.dtype).tiny
    damped = bend + 1e-3 * size[:, None, None] * torch.eye(bend.shape[-1], dtype=omega.dtype, device=omega.device)
    move = torch.linalg.solve_ex(damped, slope[..., None])[0][..., 0]
    trial = omega + move.clamp(-0.5, 0.5).nan_to_num(0.0)
    both = _gains(gram, torch.stack([phases, _phases(table.positions, trial)], 1))
    return torch.where((both[:, 1] > both[:, 0])[:, None], trial, omega)


def _snap(view: View, table: Tables, gram: Tensor, omega: Tensor) -> Tensor:
    """The best of the surrounding frequencies that the torus has."""
    assert view.torus is not None
    unit = 2 * torch.pi / torch.tensor(view.torus, dtype=omega.dtype, device=omega.device)
    corners = torch.tensor(list(product((0.0, 1.0), repeat=omega.shape[1])), dtype=omega.dtype, device=omega.device)
    around = ((omega / unit).floor()[:, None] + corners) * unit  # shape: (blocks, corners, axes)
    best = _gains(gram, _phases(table.positions, around)).argmax(1)
    return around[torch.arange(len(omega), device=omega.device), best]


def converge(
    view: View, matrices: Tensor, width: int, *, tolerance: float = 1e-4, most: int = 60
) -> tuple[Block, Triple]:
    """Start afresh and iterate until the gain stops growing; the start depends on nothing but the shape.

    Host decisions are free here: it runs once.
    """
    blocks, rows, total = matrices.shape
    real = matrices.dtype.to_real()
    table = tables(view, real, matrices.device)
    columns = total // view.taps * table.count
    width = min(width, rows, columns)
    y = random_like(matrices, (blocks, columns, width + len(table.grid)), as_complex=True)
    omega = torch.zeros(blocks, view.frequencies, dtype=real, device=matrices.device)
    block = Block(torch.linalg.qr(y[..., :width])[0], omega, unit_columns(y[..., width:]))
    for _ in range(8):
        block, _ = step(view, matrices, block)
    block = _climb(view, table, matrices, block)
    return iterate(lambda block: step(view, matrices, block), block, tolerance=tolerance, most=most)


def _climb(view: View, table: Tables, matrices: Tensor, block: Block, starts: int = 8, steps: int = 8) -> Block:
    """The block after the best of a few climbs, one from each of the best of a fine grid: maxima are many."""
    gains, reached = [], []
    for phases in table.fine_phases:
        vector = block.scouts[..., :1]
        for _ in range(4):
            image = multiply(matrices, _spread(table, vector, phases[:, None]))
            vector = unit_columns(_gather(table, multiply(matrices.mH, unit_columns(image)), phases[:, None]))
        gains.append(torch.linalg.vector_norm(image, dim=(1, 2)))
        reached.append(vector)
    leaders = torch.stack(gains, 1).topk(min(starts, len(gains)), dim=1).indices
    row = torch.arange(len(matrices), device=matrices.device)
    best, height = block, torch.zeros_like(gains[0])
    for index in leaders.mT:
        trial = Block(torch.stack(reached)[index, row], table.fine[index], block.scouts[..., :0])
        for _ in range(steps):
            trial, triple = step(view, matrices, trial)
        better = triple.sigma > height
        height = torch.where(better, triple.sigma, height)
        y = torch.cat([torch.where(better[:, None, None], trial.y, best.y[..., :1]), block.y[..., 1:]], -1)
        best = Block(y, torch.where(better[:, None], trial.omega, best.omega), block.scouts)
    return best
