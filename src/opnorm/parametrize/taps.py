"""Products with the matrix of a convolution at a frequency: spread over the taps, through the kernel, and back."""

import torch
from torch import Tensor

from opnorm.parametrize.blocks import krylov, multiply
from opnorm.parametrize.grid import Moves, Tables


def spread(table: Tables, y: Tensor, phases: Tensor) -> Tensor:
    """Spread y over the taps: (blocks, columns * residues, width) -> (blocks, columns * taps, width).

    The phases are one for all vectors or one for each, shape (blocks, 1 or width, taps).
    """
    return spread_rows(table, y.mT, phases).mT


def spread_rows(table: Tables, rows: Tensor, phases: Tensor) -> Tensor:
    """As `spread`, of vectors that are rows, each in one piece: a pass over them is then several times faster."""
    parts, turned = _parts(rows, table.classes), phases[:, :, None]
    return (parts * turned if table.classes == 1 else parts @ (table.lift * turned)).flatten(2)


def gather(table: Tables, z: Tensor, phases: Tensor) -> Tensor:
    """The adjoint of `spread`."""
    return gather_rows(table, z.mT, phases).mT


def gather_rows(table: Tables, rows: Tensor, phases: Tensor) -> Tensor:
    """The adjoint of `spread_rows`."""
    parts, turned = _parts(rows, len(table.residues)), phases.conj()[:, :, None]
    return (parts * turned).sum(-1) if table.classes == 1 else (parts @ (table.lift * turned).mT).flatten(2)


def _parts(rows: Tensor, each: int) -> Tensor:
    return rows.reshape(*rows.shape[:2], -1, each)


def space(table: Tables, matrices: Tensor, y: Tensor, phases: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The Krylov spaces at some frequencies for each block, and their images before the taps are added up."""
    count = len(y) // len(matrices)

    def through(matrix: Tensor, vectors: Tensor) -> Tensor:
        return apart(multiply(matrix, together(vectors, len(matrices))), count)

    return krylov(
        lambda y: through(matrices, spread(table, y, phases)),
        lambda x: through(matrices.mH, x),
        y,
        depth,
        lambda image: gather(table, image, phases),
    )


def apart(columns: Tensor, count: int) -> Tensor:
    """The vectors of each frequency on their own: (blocks, n, count * k) -> (blocks * count, n, k)."""
    return columns.reshape(*columns.shape[:2], count, -1).transpose(1, 2).flatten(0, 1)


def together(y: Tensor, blocks: int) -> Tensor:
    """The inverse of `apart`."""
    return y.reshape(blocks, -1, *y.shape[1:]).transpose(1, 2).flatten(2)


def climbed(table: Tables, pulled: Tensor, omega: Tensor, phases: Tensor, moves: Moves) -> Tensor:
    """Of the moves from each frequency, the one that shows each left vector the largest gain."""
    return omega + moves.by[best_moves(table, pulled.mT, phases, moves)]


def best_moves(table: Tables, rows: Tensor, phases: Tensor, moves: Moves) -> Tensor:
    """Which of the moves that is; the images of the left vectors are the rows.

    For the left vector u, `|K(w)^H u|^2 = sum_jl M_jl exp(i w.(p_l - p_j))` with M the Gram matrix of the taps,
    restricted to pairs of one residue.
    """
    taps = _parts(rows, len(table.residues))  # shape: (blocks, vectors, columns, taps)
    turned = table.pairs * phases.conj()[..., None] * phases[..., None, :]
    gram = (taps.mT @ taps.conj()) * turned  # shape: (blocks, vectors, taps, taps)
    gains = torch.linalg.vecdot(moves.across, gram @ moves.across, dim=-2)  # shape: (blocks, vectors, moves)
    best: Tensor = gains.real.argmax(-1)
    return best
