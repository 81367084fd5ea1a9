"""The largest singular triple of a convolution, tracked at a frequency that moves.

At a frequency w the convolution is the matrix K(w). The frequency goes to where the best left vector sees the
largest gain, which is a trigonometric polynomial of as many terms as pairs of taps, looked at nearby and all over. As
another left vector may overtake elsewhere, a vector is kept at each frequency of a grid; a few of these scouts advance
at a time, and what sees more than the tracked vectors takes their place.
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
    krylov,
    multiply,
    normalised,
    random_like,
    ritz_rotation,
    scaled,
    unit_columns,
)
from opnorm.parametrize.views import View

SCOUTS_A_STEP = 16
_AT_ONCE = 64
_SCALES = (0.5, 0.2, 0.08, 0.03, 0.012, 0.005, 0.002, 0.0008, 0.0003, 0.0001, 0.00003)
"""Steps of the search for a frequency, in units of the grid; the last decides the precision of the gradient."""

Points = tuple[tuple[float, ...], ...]


class Moves(NamedTuple):
    """Differences of frequencies."""

    by: Tensor  # shape: (moves, axes)
    phases: Tensor  # shape: (moves, taps)


class Tables(NamedTuple):
    """What depends on the geometry alone."""

    positions: Tensor  # shape: (taps, axes)
    residues: Tensor  # shape: (taps,)
    classes: int  # how many residues there are
    pairs: Tensor  # shape: (taps, taps): whether two taps share a residue
    grid: Tensor  # shape: (scouts, axes): where the scouts live
    moves: Moves  # where the tracked frequency may go from where it is
    nearby: Moves  # where a scout may go
    reach: Tensor  # shape: (axes,): how far a scout may be from its place in the grid


def tables(view: View, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the constants of a geometry in a real dtype."""
    return _tables(
        view.positions, view.residues, view.strides, view.torus, view.template.dtype.is_complex, dtype, device
    )


@lru_cache(maxsize=128)
def _tables(
    positions: tuple[tuple[int, ...], ...],
    residues: tuple[int, ...],
    strides: tuple[int, ...],
    torus: tuple[int, ...] | None,
    is_complex: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    classes = torch.tensor(residues, device=device)
    counts = [
        min(2 * -(-(max(axis) + 1) // stride) + 1, 12)
        for axis, stride in zip(zip(*positions, strict=True), strides, strict=True)
    ]
    spacing = [2 * torch.pi / (n * s) for n, s in zip(counts, strides, strict=True)]
    everywhere = _points([[h * i for i in range(n)] for n, h in zip(counts, spacing, strict=True)])
    # A frequency and its shift by a multiple of 2 pi / stride are the same map, up to a rotation; a real kernel is
    # covered by half of what is left.
    halved = [n if is_complex or axis else n // 2 + 1 for axis, n in enumerate(counts)]
    grid = _points([[h * i for i in range(n)] for n, h in zip(halved, spacing, strict=True)])
    steps = [point for scale in _SCALES for point in _points([[0.0, h * scale, -h * scale] for h in spacing])]

    def placed(points: Points | list[tuple[float, ...]]) -> Tensor:
        if torus is not None:  # only these frequencies exist
            units = [2 * torch.pi / n for n in torus]
            points = [tuple(round(x / u) * u for x, u in zip(point, units, strict=True)) for point in points]
        return torch.tensor(list(dict.fromkeys(points)), dtype=torch.float64).to(device, dtype)

    places = torch.tensor(positions, dtype=dtype, device=device)
    nearby, moves = placed(steps), placed([*steps, *everywhere] if len(everywhere) <= 256 else steps)
    return Tables(
        places,
        classes,
        max(residues) + 1,
        classes[:, None] == classes[None, :],
        placed(grid),
        Moves(moves, _phases(places, moves)),
        Moves(nearby, _phases(places, nearby)),
        torch.tensor([0.8 * h for h in spacing], dtype=dtype, device=device),
    )


def _points(axes: list[list[float]]) -> Points:
    return tuple(product(*axes))


def _phases(positions: Tensor, omega: Tensor) -> Tensor:
    """`exp(i w.p_j)`, shape (..., taps)."""
    angle = omega @ positions.mT
    return torch.polar(torch.ones_like(angle), angle)


def step(view: View, matrices: Tensor, block: Block, depth: int = 1) -> tuple[Block, Triple]:
    """Advance the tracked vectors, in their Krylov space of that depth, and then their frequency.

    `matrices` has shape (blocks, rows, columns * taps). Returns the best triple that the vectors hold.
    """
    table = tables(view, block.omega.dtype, block.omega.device)
    here = block.omega[:, :1]
    phases = _phases(table.positions, here)  # shape: (blocks, 1, taps)
    left, whole = _space(table, matrices, block.y, phases, depth)
    whole, scale = scaled(whole)  # shape: (blocks, columns * taps, width * depth)
    rotation = ritz_rotation(_gather(table, whole, phases))[..., : block.y.shape[-1]]
    left, whole = left @ rotation[..., :1], whole @ rotation
    here = _moved(table, whole[..., :1], here, phases, table.moves)
    phases = _phases(table.positions, here)
    y, lengths = normalised(_gather(table, whole, phases))
    direction = _direction(left, _spread(table, y[..., :1], phases), matrices)
    return (
        Block(y, torch.cat([here, block.omega[:, 1:]], 1), block.scouts),
        Triple((lengths * scale)[:, 0, 0], *direction),
    )


def follow(view: View, matrices: Tensor, block: Block) -> tuple[Block, Triple]:
    """Advance the first tracked vector alone, where it is: a quarter of the products of a `step`."""
    table = tables(view, block.omega.dtype, block.omega.device)
    phases = _phases(table.positions, block.omega[:, :1])
    left = unit_columns(multiply(matrices, _spread(table, block.y[..., :1], phases)))
    pulled, scale = scaled(multiply(matrices.mH, left))
    y, lengths = normalised(_gather(table, pulled, phases))
    direction = _direction(left, _spread(table, y, phases), matrices)
    return (
        Block(torch.cat([y, block.y[..., 1:]], -1), block.omega, block.scouts),
        Triple((lengths * scale)[:, 0, 0], *direction),
    )


def scout(view: View, matrices: Tensor, block: Block, first: int, last: int, depth: int = 1) -> Block:
    """Advance some of the scouts; the best vectors, wherever they were found, become the tracked ones."""
    table = tables(view, block.omega.dtype, block.omega.device)
    held, width = block.scouts.shape[-1] // max(len(table.grid), 1), block.y.shape[-1]
    omega = torch.cat([block.omega[:, :1], block.omega[:, 1 + first : 1 + last]], 1)
    columns = torch.cat([block.y[..., :held], block.scouts[..., held * first : held * last]], -1)
    here = omega.flatten(0, 1)[:, None]  # shape: (blocks * frequencies, 1, axes)
    phases = _phases(table.positions, here)
    _, whole = _space(table, matrices, _apart(columns, omega.shape[1]), phases, depth)
    whole, scale = scaled(whole)
    whole = whole @ ritz_rotation(_gather(table, whole, phases))[..., :held]
    moved = _moved(table, whole[..., :1], here, phases, table.nearby).reshape(omega.shape)
    far = ((moved[:, 1:] - table.grid[first:last]).abs() > table.reach).any(-1, keepdim=True)
    omega = torch.cat([moved[:, :1], torch.where(far, omega[:, 1:], moved[:, 1:])], 1)
    y, lengths = normalised(_gather(table, whole, _phases(table.positions, omega.flatten(0, 1)[:, None])))
    gains = (lengths * scale)[:, 0, 0].reshape(omega.shape[:2])
    winner = gains.argmax(-1)[:, None, None]  # shape: (blocks, 1, 1)
    apart = y.reshape(*omega.shape[:2], -1, held)
    best = apart.gather(1, winner[..., None].expand(-1, 1, y.shape[1], held))[:, 0]
    others = torch.where(winner == 0, block.y[..., held:], block.y[..., : width - held])
    return Block(
        torch.cat([best, others], -1)[..., :width],
        torch.cat(
            [
                omega.gather(1, winner.expand(-1, 1, omega.shape[-1])),
                block.omega[:, 1 : 1 + first],
                omega[:, 1:],
                block.omega[:, 1 + last :],
            ],
            1,
        ),
        torch.cat(
            [
                block.scouts[..., : held * first],
                _together(y, len(matrices))[..., held:],
                block.scouts[..., held * last :],
            ],
            -1,
        ),
    )


def _space(table: Tables, matrices: Tensor, y: Tensor, phases: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The Krylov spaces at some frequencies for each block, and their images before the taps are added up."""
    count = len(y) // len(matrices)

    def through(matrix: Tensor, vectors: Tensor) -> Tensor:
        return _apart(multiply(matrix, _together(vectors, len(matrices))), count)

    return krylov(
        lambda y: through(matrices, _spread(table, y, phases)),
        lambda x: through(matrices.mH, x),
        y,
        depth,
        lambda image: _gather(table, image, phases),
    )


def _apart(columns: Tensor, count: int) -> Tensor:
    """The vectors of each frequency on their own: (blocks, n, count * k) -> (blocks * count, n, k)."""
    return columns.reshape(*columns.shape[:2], count, -1).transpose(1, 2).flatten(0, 1)


def _together(y: Tensor, blocks: int) -> Tensor:
    """The inverse of `_apart`."""
    return y.reshape(blocks, -1, *y.shape[1:]).transpose(1, 2).flatten(2)


def home(view: View, block: Block) -> Block:
    """Send the scouts back to their places: those that met at one maximum look all over again."""
    grid = tables(view, block.omega.dtype, block.omega.device).grid
    places = grid.expand(len(block.omega), -1, -1)
    return Block(block.y, torch.cat([block.omega[:, :1], places], 1), block.scouts)


def scouted(view: View, matrices: Tensor, block: Block, turn: int, depth: int = 1) -> Block:
    """Advance the scouts whose turn it is."""
    total = block.omega.shape[1] - 1
    first = turn % -(-total // SCOUTS_A_STEP) * SCOUTS_A_STEP
    return scout(view, matrices, block, first, min(first + SCOUTS_A_STEP, total), depth)


def sweep(view: View, matrices: Tensor, block: Block, depth: int = 1) -> tuple[Block, Triple]:
    """Advance all scouts and the tracked vectors."""
    total = block.omega.shape[1] - 1
    for first in range(0, total, _AT_ONCE):
        block = scout(view, matrices, block, first, min(first + _AT_ONCE, total), depth)
    return step(view, matrices, block, depth)


def _moved(table: Tables, pulled: Tensor, omega: Tensor, phases: Tensor, moves: Moves) -> Tensor:
    """Of the moves from each frequency, the one that shows each left vector the largest gain.

    For the left vector u, `|K(w)^H u|^2 = sum_jl M_jl exp(i w.(p_l - p_j))` with M the Gram matrix of the taps,
    restricted to pairs of one residue.
    """
    taps = _split(pulled, len(table.residues)).permute(0, 3, 2, 1)  # shape: (blocks, vectors, taps, columns)
    gram = (taps @ taps.mH) * table.pairs  # shape: (blocks, vectors, taps, taps)
    tried = phases[..., None, :] * moves.phases  # shape: (blocks, vectors, moves, taps)
    images = torch.view_as_real(tried @ gram.mT)
    gains = (images * torch.view_as_real(tried)).sum((-1, -2))  # shape: (blocks, vectors, moves)
    return omega + moves.by[gains.argmax(-1)]


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


def converge(
    view: View, matrices: Tensor, width: int, held: int = 1, *, tolerance: float = 1e-4, most: int = 60
) -> tuple[Block, Triple]:
    """Start afresh and iterate until the gain stops growing; the start depends on nothing but the shape.

    Host decisions are free here: it runs once.
    """
    blocks, rows, total = matrices.shape
    real = matrices.dtype.to_real()
    table = tables(view, real, matrices.device)
    columns = total // view.taps * table.classes
    width = min(width, rows, columns)
    held = min(held, width)
    y = random_like(matrices, (blocks, columns, width + held * len(table.grid)), as_complex=True)
    omega = torch.cat([torch.zeros_like(table.grid[:1]), table.grid]).expand(blocks, -1, -1)
    block = Block(torch.linalg.qr(y[..., :width])[0], omega, unit_columns(y[..., width:]))

    def advance(block: Block) -> tuple[Block, Triple]:
        return sweep(view, matrices, block)

    for _ in range(12):
        block, _ = advance(block)
    return iterate(advance, block, tolerance=tolerance, most=most, least=8)
