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
    classes: int  # how many residues there are
    grid: Tensor  # shape: (scouts, axes)
    pairs: Tensor  # shape: (taps, taps): whether two taps share a residue
    differences: Tensor  # shape: (taps, taps, axes): p_l - p_j for the entry (j, l)
    squares: Tensor  # shape: (taps, taps, axes, axes): their outer products
    reach: Tensor  # shape: (axes,): how far a scout may leave its place


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
    counts = tuple(
        min(2 * -(-(max(axis) + 1) // stride) + 1, 12)
        for axis, stride in zip(zip(*positions, strict=True), strides, strict=True)
    )
    grid = _grid(counts, strides, half=not is_complex).to(device, dtype)
    apart = places[None, :] - places[:, None]
    return Tables(
        places,
        classes,
        max(residues) + 1,
        grid,
        classes[:, None] == classes[None, :],
        apart,
        apart[..., :, None] * apart[..., None, :],
        torch.tensor([5.0 / (n * s) for n, s in zip(counts, strides, strict=True)], dtype=dtype, device=device),
    )


def _grid(counts: tuple[int, ...], strides: tuple[int, ...], *, half: bool) -> Tensor:
    """Frequencies that cover what differs, for a real kernel half of it, shape (count, axes).

    A frequency and its shift by a multiple of 2 pi / stride are the same map, up to a rotation.
    """
    steps = [[2 * torch.pi * i / (s * n) for i in range(n)] for n, s in zip(counts, strides, strict=True)]
    kept = [row[: len(row) // 2 + 1] if half and axis == 0 else row for axis, row in enumerate(steps)]
    return torch.tensor(list(product(*kept)), dtype=torch.float64).reshape(-1, len(counts))


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
    omega = torch.cat([block.omega[:, :1], block.omega[:, 1 + first : 1 + last]], 1)
    phases = _phases(table.positions, omega)  # shape: (blocks, 1 + scouts, taps)
    lifted = _spread(table, torch.cat([block.y, block.scouts[..., first:last]], -1), _repeated(phases, width))
    images = multiply(matrices, lifted)
    left = torch.linalg.qr(images[..., :width])[0]
    both = torch.cat([left, unit_columns(images[..., width:])], -1)
    pulled = multiply(matrices.mH, both)  # shape: (blocks, columns * taps, width + advancing scouts)
    rotation = ritz_rotation(_gather(table, pulled[..., :width], phases[:, :1]))
    main, left = pulled[..., :width] @ rotation, left @ rotation
    seen = torch.cat([main[..., :1], pulled[..., width:]], -1)
    moved, gains = _climbed(view, table, seen, omega)
    winner = gains.argmax(1)
    row = torch.arange(len(omega), device=omega.device)
    scouts, places = block.scouts, block.omega[:, 1:]
    if last > first:
        home = table.grid[first:last]
        near = ((moved[:, 1:] - home).abs() <= table.reach).all(-1, keepdim=True)
        there = torch.where(near, moved[:, 1:], home)
        advanced, _ = normalised(_gather(table, pulled[..., width:], _phases(table.positions, there)))
        scouts = torch.cat([scouts[..., :first], advanced, scouts[..., last:]], -1)
        places = torch.cat([places[:, :first], there, places[:, last:]], 1)
        # The scout that sees most takes the place of the weakest vector: the winner, unless that is the best so far.
        guest = torch.where(winner > 0, winner - 1, gains[:, 1:].argmax(1))[:, None, None]
        main = torch.cat([main[..., : max(1, width - 1)], _take(pulled[..., width:], guest)], -1)
        left = torch.cat([left[..., : max(1, width - 1)], _take(both[..., width:], guest)], -1)
    best = moved[row, winner][:, None]
    here = _phases(table.positions, best)
    y, lengths = normalised(_gather(table, main, here))
    order = lengths.argsort(-1, descending=True)
    y = y.gather(-1, order.expand_as(y))[..., :width]
    direction = _direction(_take(left, order[..., :1]), _spread(table, y[..., :1], here), matrices)
    return Block(y, torch.cat([best, places], 1), scouts), Triple(lengths.amax((1, 2)), *direction)


def _repeated(phases: Tensor, width: int) -> Tensor:
    """The first frequency for each vector of the block, the others for one scout each."""
    return torch.cat([phases[:, :1].expand(-1, width, -1), phases[:, 1:]], 1)


def _take(columns: Tensor, index: Tensor) -> Tensor:
    """One column of each block, (blocks, n, width), (blocks, 1, 1) -> (blocks, n, 1)."""
    return columns.gather(-1, index.expand(-1, columns.shape[1], 1))


def _direction(left: Tensor, lifted: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`Re(left^H W lifted)` as an inner product with a real weight of rank two."""
    if matrices.is_complex():
        return left, lifted
    return torch.cat([left.real, left.imag], -1), torch.cat([lifted.real, lifted.imag], -1)


def _split(x: Tensor, parts: int) -> Tensor:
    return x.reshape(x.shape[0], -1, parts, x.shape[2])


def _spread(table: Tables, y: Tensor, phases: Tensor) -> Tensor:
    """Spread y over the taps: (blocks, columns * residues, width) -> (blocks, columns * taps, width).

    The phases are one for all vectors or one for each, shape (blocks, 1 or width, taps).
    """
    spread = _split(y, table.classes)
    if table.classes > 1:
        spread = spread[:, :, table.residues]
    return (spread * phases.mT[:, None]).flatten(1, 2)


def _gather(table: Tables, z: Tensor, phases: Tensor) -> Tensor:
    """The adjoint of `_spread`."""
    turned = _split(z, len(table.residues)) * phases.mT[:, None].conj()
    if table.classes == 1:
        return turned.sum(2)
    sums = turned.new_zeros(*turned.shape[:2], table.classes, turned.shape[3])
    return torch.index_add(sums, 2, table.residues, turned).flatten(1, 2)


def _climbed(view: View, table: Tables, pulled: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """One step for each left vector towards the frequency at which it is seen with the largest gain, and that gain.

    For the left vector u, `|K(w)^H u|^2 = sum_jl M_jl exp(i w.(p_l - p_j))` with M the Gram matrix of the taps,
    restricted to pairs of one residue.
    """
    taps = _split(pulled, len(table.residues)).permute(0, 3, 2, 1)  # shape: (blocks, width, taps, columns)
    largest = taps.abs().amax((1, 2, 3), keepdim=True)
    taps = taps / torch.where(largest > 0, largest, torch.ones_like(largest))
    gram = (taps @ taps.mH) * table.pairs  # shape: (blocks, width, taps, taps)
    omega = _newton(table, gram, omega)
    if view.torus:
        omega = _snapped(view, table, gram, omega)
    return omega, _gains(gram, _phases(table.positions, omega)[..., None, :])[..., 0]


def _gains(gram: Tensor, phases: Tensor) -> Tensor:
    """The squared gain at each candidate: (..., taps, taps), (..., n, taps) -> (..., n)."""
    return ((phases.conj() @ gram) * phases).sum(-1).real


def _newton(table: Tables, gram: Tensor, omega: Tensor) -> Tensor:
    """One Newton step towards the nearest maximum, kept only where it does not lose."""
    phases = _phases(table.positions, omega)
    terms = gram * phases.conj()[..., :, None] * phases[..., None, :]
    slope = torch.einsum("...jl,jla->...a", -terms.imag, table.differences)
    bend = torch.einsum("...jl,jlac->...ac", terms.real, table.squares)
    # The Hessian is -bend; damped to be safely invertible where the gain does not bend along some axis.
    size = bend.diagonal(dim1=-2, dim2=-1).abs().amax(-1) + torch.finfo(omega.dtype).tiny
    damped = bend + 1e-3 * size[..., None, None] * torch.eye(bend.shape[-1], dtype=omega.dtype, device=omega.device)
    move = torch.linalg.solve_ex(damped, slope[..., None])[0][..., 0]
    trial = omega + move.clamp(-0.5, 0.5).nan_to_num(0.0)
    both = _gains(gram, torch.stack([phases, _phases(table.positions, trial)], -2))
    return torch.where((both[..., 1] > both[..., 0])[..., None], trial, omega)


def _snapped(view: View, table: Tables, gram: Tensor, omega: Tensor) -> Tensor:
    """The best of the surrounding frequencies that the torus has."""
    assert view.torus is not None
    unit = 2 * torch.pi / torch.tensor(view.torus, dtype=omega.dtype, device=omega.device)
    corners = torch.tensor(list(product((0.0, 1.0), repeat=omega.shape[-1])), dtype=omega.dtype, device=omega.device)
    around = ((omega / unit).floor()[..., None, :] + corners) * unit  # shape: (..., corners, axes)
    best = _gains(gram, _phases(table.positions, around)).argmax(-1)[..., None, None]
    return around.gather(-2, best.expand(*best.shape[:-1], omega.shape[-1]))[..., 0, :]


def converge(
    view: View, matrices: Tensor, width: int, *, tolerance: float = 1e-4, most: int = 60
) -> tuple[Block, Triple]:
    """Start afresh and iterate until the gain stops growing; the start depends on nothing but the shape.

    Host decisions are free here: it runs once.
    """
    blocks, rows, total = matrices.shape
    real = matrices.dtype.to_real()
    table = tables(view, real, matrices.device)
    columns = total // view.taps * table.classes
    width = min(width, rows, columns)
    y = random_like(matrices, (blocks, columns, width + len(table.grid)), as_complex=True)
    omega = torch.cat([torch.zeros_like(table.grid[:1]), table.grid]).expand(blocks, -1, -1)
    block = Block(torch.linalg.qr(y[..., :width])[0], omega, unit_columns(y[..., width:]))
    for _ in range(12):
        block, _ = step(view, matrices, block)
    return iterate(lambda block: step(view, matrices, block), block, tolerance=tolerance, most=most, least=8)
