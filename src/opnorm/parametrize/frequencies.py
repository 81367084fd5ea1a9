"""The largest singular triple of a convolution, tracked at a frequency that moves.

At a frequency w the convolution is the matrix K(w). The frequency goes to where the best left vector sees the
largest gain, which is a trigonometric polynomial of as many terms as pairs of taps, looked at nearby and all over. As
another left vector may overtake elsewhere, `scouts` are kept at each frequency of a grid.
"""

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
    scaled,
    unit_columns,
)
from opnorm.parametrize.grid import phases_of, tables
from opnorm.parametrize.scouts import scout
from opnorm.parametrize.taps import best_moves, climbed, gather, gather_rows, space, spread, spread_rows
from opnorm.parametrize.views import View

_AT_ONCE = 64
"""Scouts that advance together in a sweep."""

_AT_START = 3
"""Vectors that each scout has, at least, until the first estimate stands."""


def step(view: View, matrices: Tensor, block: Block, depth: int = 1) -> tuple[Block, Triple]:
    """Advance the tracked vectors, in their Krylov space of that depth, and then their frequency.

    `matrices` has shape (blocks, rows, columns * taps). Returns the best triple that the vectors hold.
    """
    table = tables(view, block.omega.dtype, block.omega.device)
    here = block.omega[:, :1]
    phases = phases_of(table.positions, here)  # shape: (blocks, 1, taps)
    left, whole = space(table, matrices, block.y, phases, depth)
    whole, scale = scaled(whole)  # shape: (blocks, columns * taps, width * depth)
    rotation = ritz_rotation(gather(table, whole, phases))[..., : block.y.shape[-1]]
    left, whole = left @ rotation[..., :1], whole @ rotation
    here = climbed(table, whole[..., :1], here, phases, table.moves)
    phases = phases_of(table.positions, here)
    y, lengths = normalised(gather(table, whole, phases))
    direction = _direction(left, spread(table, y[..., :1], phases), matrices)
    return (
        Block(y, torch.cat([here, block.omega[:, 1:]], 1), block.scouts),
        Triple((lengths * scale)[:, 0, 0], *direction),
    )


def at_once(view: View, matrices: Tensor, block: Block, first: int, last: int) -> tuple[Block, Triple]:
    """Advance the tracked vectors, and some scouts from their places, in one pass each way over the weight.

    The scouts hold one vector each. The best of all is the triple's, and the first that is tracked from now on.
    """
    table = tables(view, block.omega.dtype, block.omega.device)
    blocks, width = len(matrices), block.y.shape[-1]
    begun = torch.cat([block.omega[:, :1].expand(-1, width, -1), table.grid[first:last].expand(blocks, -1, -1)], 1)
    here = phases_of(table.positions, block.omega[:, :1])
    phases = torch.cat([here.expand(-1, width, -1), table.places[first:last].expand(blocks, -1, -1)], 1)
    rows = torch.cat([block.y, block.scouts[..., first:last]], -1).mT
    image, scale = scaled(multiply(matrices, spread_rows(table, rows, phases).mT))
    left = torch.cat([torch.linalg.qr(image[..., :width])[0], unit_columns(image[..., width:])], -1)
    whole = multiply(matrices.mH, left / scale).mT  # shape: (blocks, vectors, columns * taps)
    rotation = ritz_rotation(gather_rows(table, whole[:, :width], here).mT)
    left[..., :width] = left[..., :width] @ rotation
    whole[:, :width] = rotation.mT @ whole[:, :width]
    moved = best_moves(table, whole, phases, table.close)
    moved[:, 1:width] = moved[:, :1]
    phases, omega = phases * table.close.phases[moved], begun + table.close.by[moved]
    rows, lengths = normalised(gather_rows(table, whole, phases), 2)
    # What is tracked besides the best is seen at the frequency of the first.
    lengths[:, 1:width] = 0
    best = lengths.argmax(1, keepdim=True)  # shape: (blocks, 1, 1)

    def of_best(part: Tensor) -> Tensor:
        return part.gather(1, best.expand(-1, 1, part.shape[2]))

    found = of_best(rows)
    others = torch.where(best == 0, rows[:, 1:width], rows[:, : width - 1])
    lifted = spread_rows(table, found, of_best(phases)).mT
    scouts = torch.cat([block.scouts[..., :first], rows[:, width:].mT, block.scouts[..., last:]], -1)
    return (
        Block(torch.cat([found, others], 1).mT, torch.cat([of_best(omega), block.omega[:, 1:]], 1), scouts),
        Triple(of_best(lengths * scale)[:, 0, 0], *_direction(of_best(left.mT).mT, lifted, matrices)),
    )


def sweep(view: View, matrices: Tensor, block: Block, depth: int = 1) -> tuple[Block, Triple]:
    """Advance all scouts and the tracked vectors."""
    total = block.omega.shape[1] - 1
    for first in range(0, total, _AT_ONCE):
        block = scout(view, matrices, block, first, min(first + _AT_ONCE, total), depth)
    return step(view, matrices, block, depth)


def converge(
    view: View, matrices: Tensor, width: int, held: int = 1, *, tolerance: float = 1e-4, most: int = 60
) -> tuple[Block, Triple]:
    """Start afresh and iterate until the gain stops growing; the start depends on nothing but the shape.

    Each scout begins with more vectors than it is to hold. Host decisions are free here: it runs once.
    """
    blocks, rows, total = matrices.shape
    real = matrices.dtype.to_real()
    table = tables(view, real, matrices.device)
    columns = total // view.taps * table.classes
    width = min(width, rows, columns)
    held, begun = min(held, width), min(max(held, _AT_START), width)
    y = random_like(matrices, (blocks, columns, width + begun * len(table.grid)), as_complex=True)
    omega = torch.cat([torch.zeros_like(table.grid[:1]), table.grid]).expand(blocks, -1, -1)
    block = Block(torch.linalg.qr(y[..., :width])[0], omega, unit_columns(y[..., width:]))

    def advance(block: Block) -> tuple[Block, Triple]:
        return sweep(view, matrices, block)

    for _ in range(12):
        block, _ = advance(block)
    block, triple = iterate(advance, block, tolerance=tolerance, most=most, least=8)
    if view.torus is not None:
        block, triple = iterate(advance, _beside(view, matrices, block), tolerance=tolerance, most=most, least=8)
    return block._replace(scouts=block.scouts.reshape(*y.shape[:2], -1, begun)[..., :held].flatten(2)), triple


def _beside(view: View, matrices: Tensor, block: Block) -> Block:
    """Put each scout, on a torus, on the frequencies beside its own, with vectors that it finds there.

    The search for a frequency holds a left vector, which may see less at the next although that has the larger gain.
    """
    places = block.omega[:, 1:]
    for by in tables(view, block.omega.dtype, block.omega.device).nearby.by[1:]:
        omega = torch.cat([block.omega[:, :1], places + by], 1)
        block, _ = sweep(view, matrices, block._replace(omega=omega), depth=2)
    return block


def _direction(left: Tensor, lifted: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`Re(left^H W lifted)` as an inner product with a real weight of rank two, whose columns are each in one piece."""
    if matrices.is_complex():
        return left, lifted
    left, lifted = (torch.view_as_real(part).flatten(2).mT.contiguous().mT for part in (left, lifted))
    return left, lifted
