"""The largest singular triple of a weight, tracked by a block of vectors at one frequency.

Each step is a block power iteration with a Rayleigh-Ritz projection; for a convolution the frequency moves to where
the current left vectors see the largest gain, which is a trigonometric polynomial of as many terms as pairs of taps.
All of it is tensor operations without a decision on the host, so that accelerators do not wait.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm.parametrize.views import View

NEWTON_STEPS = 2


class Block(NamedTuple):
    """Right vectors at one frequency, the best first, and scouts: one vector at each frequency of a fixed grid."""

    y: Tensor  # shape: (blocks, columns * residues, width), complex where the map varies with the frequency
    omega: Tensor  # shape: (blocks, axes)
    scouts: Tensor  # shape: (blocks, columns * residues, grid)


class Triple(NamedTuple):
    """A singular triple as a low-rank direction: sigma = <left right^T, W> is the gain, and that is its gradient."""

    sigma: Tensor  # shape: (blocks,)
    left: Tensor  # shape: (blocks, rows, rank)
    right: Tensor | None  # shape: (blocks, columns * taps, rank); None: `left` is the direction itself


def step(view: View, matrices: Tensor, block: Block) -> tuple[Block, Triple]:
    """Advance the block by one iteration and return the best triple that it holds.

    `matrices` has shape (blocks, rows, columns * taps), in float32, float64 or complex.
    """
    width = block.y.shape[-1]
    lifted = lift(view, block.y, block.omega)
    if block.scouts.shape[-1]:
        lifted = torch.cat([lifted, lift_grid(view, block.scouts)], -1)
    images = multiply(matrices, lifted)
    left = torch.cat([torch.linalg.qr(images[..., :width])[0], _unit(images[..., width:])], -1)
    pulled = multiply(matrices.mH, left)  # shape: (blocks, columns * taps, width + scouts)
    rotation = ritz_rotation(drop(view, pulled[..., :width], block.omega))
    main, left_main = pulled[..., :width] @ rotation, left[..., :width] @ rotation
    omega, scouts = block.omega, block.scouts
    if scouts.shape[-1]:
        scouts = drop_grid(view, pulled[..., width:])
        guest = torch.linalg.vector_norm(scouts, dim=1).argmax(-1)[:, None, None]
        scouts = _unit(scouts)
        seen = _take(pulled[..., width:], guest)
        places = torch.stack([omega, view.grid(1).to(omega)[guest[:, 0, 0]]], 1)
        omega = _best_frequency(view, torch.cat([main[..., :1], seen], -1), places, view.grid(2))
        # The scout that sees most takes the place of the weakest vector.
        main = torch.cat([main[..., : max(1, width - 1)], seen], -1)
        left_main = torch.cat([left_main[..., : max(1, width - 1)], _take(left[..., width:], guest)], -1)
    elif view.frequencies:
        omega = _best_frequency(view, main[..., :1], omega[:, None], view.grid(2)[:0])
    y = drop(view, main, omega)
    lengths = _length(y)
    y = y / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    order = lengths.argsort(-1, descending=True).expand_as(y)
    y = y.gather(-1, order)[..., :width]
    top = _take(left_main, lengths.argmax(-1, keepdim=True))
    return Block(y, omega, scouts), Triple(lengths.amax((1, 2)), *_direction(top, lift(view, y[..., :1], omega), matrices))


def ritz_rotation(y: Tensor) -> Tensor:
    """The rotation of orthonormal left vectors that makes them Ritz vectors, the best first."""
    scale = y.abs().amax((1, 2), keepdim=True)
    unit = y / torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.linalg.eigh(unit.mH @ unit)[1].flip(-1)


def _length(y: Tensor) -> Tensor:
    """The norm of each column, without overflow or underflow on the way, shape (blocks, 1, width)."""
    scale = y.abs().amax((1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.linalg.vector_norm(y / scale, dim=1, keepdim=True) * scale


def _take(columns: Tensor, index: Tensor) -> Tensor:
    """One column of each block, (blocks, n, width), (blocks, 1, 1) -> (blocks, n, 1)."""
    return columns.gather(-1, index.expand(-1, columns.shape[1], 1))


def _direction(left: Tensor, lifted: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`Re(left^H W lifted)` as an inner product with a real weight of rank two, or of rank one for real vectors."""
    if lifted.is_complex() == matrices.is_complex():
        return left, lifted
    return torch.cat([left.real, left.imag], -1), torch.cat([lifted.real, lifted.imag], -1)


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return `matrix @ vectors`, where only the vectors may be complex, in one pass over a real matrix.

    The vectors are the rows of the product that is computed: on the CPU that order is several times faster for a few
    vectors, and a single block goes past the batched kernels.
    """
    if vectors.is_complex() and not matrix.is_complex():
        both = multiply(matrix, torch.cat([vectors.real, vectors.imag], -1))
        return torch.complex(*both.chunk(2, -1))
    if len(matrix) == 1:
        return (vectors[0].mT @ matrix[0].mT).mT[None]
    return (vectors.mT @ matrix.mT).mT


def _phases(view: View, omega: Tensor) -> Tensor:
    """`exp(i w.p_j)`, shape (..., taps)."""
    positions = torch.tensor(view.positions, dtype=omega.dtype, device=omega.device).reshape(view.taps, -1)
    angle = omega @ positions.mT
    return torch.polar(torch.ones_like(angle), angle)


def lift(view: View, y: Tensor, omega: Tensor) -> Tensor:
    """Spread the entries of y over the taps: (blocks, columns * residues, width) -> (blocks, columns * taps, width)."""
    if not view.frequencies:
        return y
    return _spread(view, y, _phases(view, omega)[:, None, :, None])


def lift_grid(view: View, y: Tensor) -> Tensor:
    """Like `lift`, each vector at its own frequency of the grid."""
    return _spread(view, y, _phases(view, _grid_like(view, y)).mT)


def drop(view: View, z: Tensor, omega: Tensor) -> Tensor:
    """The adjoint of `lift`."""
    if not view.frequencies:
        return z
    return _gather(view, z, _phases(view, omega)[:, None, :, None])


def drop_grid(view: View, z: Tensor) -> Tensor:
    """The adjoint of `lift_grid`."""
    return _gather(view, z, _phases(view, _grid_like(view, z)).mT)


def _grid_like(view: View, y: Tensor) -> Tensor:
    return view.grid(1).to(y.device, y.real.dtype)


def _spread(view: View, y: Tensor, phases: Tensor) -> Tensor:
    residues = max(view.residues) + 1
    spread = y.unflatten(1, (-1, residues))[:, :, list(view.residues)]
    return (spread * phases).flatten(1, 2)


def _gather(view: View, z: Tensor, phases: Tensor) -> Tensor:
    turned = z.unflatten(1, (-1, view.taps)) * phases.conj()
    residues = max(view.residues) + 1
    if residues == 1:
        return turned.sum(2)
    sums = torch.zeros(*turned.shape[:2], residues, turned.shape[3], dtype=turned.dtype, device=turned.device)
    return sums.index_add(2, torch.tensor(view.residues, device=turned.device), turned).flatten(1, 2)


def _best_frequency(view: View, pulled: Tensor, current: Tensor, grid: Tensor) -> Tensor:
    """The frequency at which one of the left vectors is seen with the largest gain.

    For the left vector u, `|K(w)^H u|^2 = sum_jl M_jl exp(i w.(p_l - p_j))` with M the Gram matrix of the taps,
    restricted to pairs of one residue. Tried are `current`, shape (blocks, n, axes), and `grid`, shape (m, axes).
    """
    device = current.device
    taps = pulled.unflatten(1, (-1, view.taps))  # shape: (blocks, columns, taps, width)
    largest = taps.abs().amax((1, 2, 3), keepdim=True)
    taps = (taps / torch.where(largest > 0, largest, torch.ones_like(largest))).permute(0, 3, 2, 1)
    residues = torch.tensor(view.residues, device=device)
    gram = (taps @ taps.mH) * (residues[:, None] == residues[None, :])  # shape: (blocks, width, taps, taps)
    candidates = torch.cat([current, grid.to(current).expand(len(current), -1, -1)], 1)
    gains = _gains(view, gram, candidates)  # shape: (blocks, width, candidates)
    best = gains.flatten(1).argmax(1)
    row = torch.arange(len(current), device=device)
    chosen = gram[row, best // gains.shape[2]]
    refined = _newton(view, chosen, candidates[row, best % gains.shape[2]])
    return _snap(view, chosen, refined) if view.torus else refined


def _gains(view: View, gram: Tensor, candidates: Tensor) -> Tensor:
    """The squared gain at each candidate: (blocks, width, taps, taps), (blocks, n, axes) -> (blocks, width, n)."""
    phases = _phases(view, candidates)[:, None]  # shape: (blocks, 1, n, taps)
    return ((phases.conj() @ gram) * phases).sum(-1).real


def _newton(view: View, gram: Tensor, omega: Tensor) -> Tensor:
    """A few Newton steps towards the nearest maximum, each kept only where it does not lose."""
    positions = torch.tensor(view.positions, dtype=omega.dtype, device=omega.device)
    difference = positions[None, :] - positions[:, None]  # shape: (taps, taps, axes); entry (j, l) is p_l - p_j
    best = _gains(view, gram[:, None], omega[:, None])[:, 0, 0]
    for _ in range(NEWTON_STEPS):
        phases = _phases(view, omega)
        terms = gram * phases.conj()[:, :, None] * phases[:, None, :]
        slope = torch.einsum("bjl,jla->ba", -terms.imag, difference)
        bend = torch.einsum("bjl,jla,jlc->bac", terms.real, difference, difference)
        # The Hessian is -bend; damped to be safely invertible where the gain does not bend along some axis.
        size = bend.diagonal(dim1=1, dim2=2).abs().amax(1) + torch.finfo(omega.dtype).tiny
        damped = bend + 1e-3 * size[:, None, None] * torch.eye(bend.shape[-1], dtype=omega.dtype, device=omega.device)
        move = torch.linalg.solve_ex(damped, slope[..., None])[0][..., 0]
        trial = omega + move.clamp(-0.5, 0.5).nan_to_num(0.0)
        gain = _gains(view, gram[:, None], trial[:, None])[:, 0, 0]
        better = gain > best
        omega = torch.where(better[:, None], trial, omega)
        best = torch.where(better, gain, best)
    return omega


def _snap(view: View, gram: Tensor, omega: Tensor) -> Tensor:
    """The best of the surrounding frequencies that the torus has."""
    assert view.torus is not None
    unit = 2 * torch.pi / torch.tensor(view.torus, dtype=omega.dtype, device=omega.device)
    corners = torch.tensor(list(product((0.0, 1.0), repeat=view.frequencies)), dtype=omega.dtype, device=omega.device)
    around = ((omega / unit).floor()[:, None] + corners) * unit  # shape: (blocks, corners, axes)
    best = _gains(view, gram[:, None], around)[:, 0].argmax(1)
    return around[torch.arange(len(omega), device=omega.device), best]


def start(view: View, matrices: Tensor, width: int) -> Block:
    """Return a block from a start that depends on nothing but the shape; Lanczos for a matrix."""
    blocks, rows, total = matrices.shape
    columns = total // view.taps * (max(view.residues) + 1)
    width = min(width, rows, columns)
    real = matrices.real.dtype if matrices.is_complex() else matrices.dtype
    omega = torch.zeros(blocks, view.frequencies, dtype=real, device=matrices.device)
    if view.frequencies:
        y = random_like(matrices, (blocks, columns, width + len(view.grid(1))), as_complex=True)
        return Block(torch.linalg.qr(y[..., :width])[0], omega, _unit(y[..., width:]))
    vector = random_like(matrices, (blocks, columns, 1), as_complex=False)
    basis, image = [], []
    for _ in range(min(columns, rows, 32)):
        basis.append(_unit(vector))
        image.append(multiply(matrices, basis[-1]))
        vector = multiply(matrices.mH, _unit(image[-1]))
        known = torch.cat(basis, -1)
        for _ in range(2):
            vector = vector - known @ (known.mH @ vector)
    images = torch.cat(image, -1)
    largest = images.abs().amax((1, 2), keepdim=True)
    right = torch.linalg.svd(images / torch.where(largest > 0, largest, torch.ones_like(largest)))[2]
    return Block(torch.cat(basis, -1) @ right.mH[..., :width], omega, vector[..., :0])


def converge(view: View, matrices: Tensor, width: int, *, tolerance: float = 1e-4, most: int = 60) -> tuple[Block, Triple]:
    """Start afresh and iterate until the gain stops growing. Host decisions are free here: it runs once."""
    block = start(view, matrices, width)
    if view.frequencies:
        for _ in range(8):
            block, _ = step(view, matrices, block)
        block = _climb(view, matrices, block)
    return iterate(lambda block: step(view, matrices, block), block, tolerance=tolerance, most=most)


def _climb(view: View, matrices: Tensor, block: Block, starts: int = 8, steps: int = 8) -> Block:
    """The block after the best of a few climbs, one from each of the best of a fine grid: maxima are many."""
    grid = view.grid(2).to(block.omega)
    gains, reached = [], []
    for place in grid:
        vector, omega = block.scouts[..., :1], place.expand_as(block.omega)
        for _ in range(4):
            image = multiply(matrices, lift(view, vector, omega))
            vector = _unit(drop(view, multiply(matrices.mH, _unit(image)), omega))
        gains.append(torch.linalg.vector_norm(image, dim=(1, 2)))
        reached.append(vector)
    leaders = torch.stack(gains, 1).topk(min(starts, len(grid)), dim=1).indices
    row = torch.arange(len(matrices), device=matrices.device)
    best, height = block, torch.zeros_like(gains[0])
    for index in leaders.mT:
        trial = Block(torch.stack(reached)[index, row], grid[index], block.scouts[..., :0])
        for _ in range(steps):
            trial, triple = step(view, matrices, trial)
        better = triple.sigma > height
        height = torch.where(better, triple.sigma, height)
        y = torch.cat([torch.where(better[:, None, None], trial.y, best.y[..., :1]), block.y[..., 1:]], -1)
        best = Block(y, torch.where(better[:, None], trial.omega, best.omega), block.scouts)
    return best


def iterate(
    advance: Callable[[Block], tuple[Block, Triple]], block: Block, *, tolerance: float, most: int
) -> tuple[Block, Triple]:
    """Advance until the gain grows by less than a tenth of the tolerance, at least once."""
    block, triple = advance(block)
    for _ in range(most - 1):
        before = triple.sigma
        block, triple = advance(block)
        if not bool((triple.sigma > before * (1 + tolerance / 10)).any()):
            break
    return block, triple


def _unit(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(_tiny(vectors))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def random_like(like: Tensor, shape: tuple[int, ...], *, as_complex: bool) -> Tensor:
    """Gaussian vectors that are the same in every process."""
    generator = torch.Generator().manual_seed(0)
    real = like.real.dtype if like.is_complex() else like.dtype
    wanted = like.dtype if like.is_complex() else torch.promote_types(real, torch.complex64) if as_complex else real
    if wanted.is_complex:
        pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        return torch.complex(pair[0], pair[1]).to(like.device, wanted)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like.device, wanted)
