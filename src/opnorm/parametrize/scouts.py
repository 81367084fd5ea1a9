"""Vectors that watch the frequencies at which a convolution is not tracked.

A few of them advance at a time, each near its place in a grid, and what sees more than the tracked vectors takes their
place.
"""

import torch
from torch import Tensor

from opnorm.parametrize.blocks import Block, normalised, ritz_rotation, scaled
from opnorm.parametrize.grid import Tables, phases_of, tables
from opnorm.parametrize.taps import apart, climbed, gather, space, together
from opnorm.parametrize.views import View

AT_ONCE, AT_ONCE_OLD = 32, 13
"""How many advance together, of a young weight and of an old one."""


def home(view: View, block: Block) -> Block:
    """Send the scouts back to their places: those that met at one maximum look all over again."""
    grid = tables(view, block.omega.dtype, block.omega.device).grid
    places = grid.expand(len(block.omega), -1, -1)
    return Block(block.y, torch.cat([block.omega[:, :1], places], 1), block.scouts)


def on_turn(block: Block, turn: int, *, old: bool) -> tuple[int, int]:
    """Return which scouts advance, from the first to before the last."""
    total = block.omega.shape[1] - 1
    turns = -(-total // (AT_ONCE_OLD if old else AT_ONCE))
    part = turn % turns
    return total * part // turns, total * (part + 1) // turns


def stayed(table: Tables, moved: Tensor, before: Tensor, first: int, last: int) -> Tensor:
    """Where scouts have moved to, and where they were if that is too far from their places."""
    far = ((moved - table.grid[first:last]).abs() > table.reach).any(-1, keepdim=True)
    return torch.where(far, before, moved)


def scout(view: View, matrices: Tensor, block: Block, first: int, last: int, depth: int = 1) -> Block:
    """Advance some of the scouts; the best vectors, wherever they were found, become the tracked ones."""
    table = tables(view, block.omega.dtype, block.omega.device)
    held, width = block.scouts.shape[-1] // max(len(table.grid), 1), block.y.shape[-1]
    omega = torch.cat([block.omega[:, :1], block.omega[:, 1 + first : 1 + last]], 1)
    columns = torch.cat([block.y[..., :held], block.scouts[..., held * first : held * last]], -1)
    here = omega.flatten(0, 1)[:, None]  # shape: (blocks * frequencies, 1, axes)
    phases = phases_of(table.positions, here)
    _, whole = space(table, matrices, apart(columns, omega.shape[1]), phases, depth)
    whole, scale = scaled(whole)
    whole = whole @ ritz_rotation(gather(table, whole, phases))[..., :held]
    moved = climbed(table, whole[..., :1], here, phases, table.nearby).reshape(omega.shape)
    omega = torch.cat([moved[:, :1], stayed(table, moved[:, 1:], omega[:, 1:], first, last)], 1)
    y, lengths = normalised(gather(table, whole, phases_of(table.positions, omega.flatten(0, 1)[:, None])))
    gains = (lengths * scale)[:, 0, 0].reshape(omega.shape[:2])
    winner = gains.argmax(-1)[:, None, None]  # shape: (blocks, 1, 1)
    each = y.reshape(*omega.shape[:2], -1, held)
    best = each.gather(1, winner[..., None].expand(-1, 1, y.shape[1], held))[:, 0]
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
                together(y, len(matrices))[..., held:],
                block.scouts[..., held * last :],
            ],
            -1,
        ),
    )
