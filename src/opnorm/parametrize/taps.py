"""Products with the matrix of a convolution at a frequency: spread over the taps, through the kernel, and back."""

import torch
from torch import Tensor

from opnorm.parametrize.blocks import krylov, multiply
from opnorm.parametrize.grid import Moves, Tables


def spread(table: Tables, y: Tensor, phases: Tensor) -> Tensor:
    """Spread y over the taps: (blocks, columns * residues, width) -> (blocks, columns * taps, width).

    The phases are one for all vectors or one for each, shape (blocks, 1 or width, taps).
    """
    repeated = _split(y, table.classes)
    if table.classes > 1:
        repeated = repeated[:, :, table.residues]
    return (repeated * phases.mT[:, None]).flatten(1, 2)


def gather(table: Tables, z: Tensor, phases: Tensor) -> Tensor:
    """The adjoint of `spread`."""
    turned = _split(z, len(table.residues)) * phases.mT[:, None].conj()
    if table.classes == 1:
        return turned.sum(2)
    sums = turned.new_zeros(*turned.shape[:2], table.classes, turned.shape[3])
    return torch.index_add(sums, 2, table.residues, turned).flatten(1, 2)


def _split(x: Tensor, parts: int) -> Tensor:
    return x.reshape(x.shape[0], -1, parts, x.shape[2])


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
