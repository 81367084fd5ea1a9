"""The largest singular triple of a weight, tracked by a block of vectors.

Each step is a Rayleigh-Ritz projection on a small block Krylov space. All of it is tensor operations without a
decision on the host, so that accelerators do not wait.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm.parametrize.on_device import host_waits, leading_rotation
from opnorm.parametrize.sharding import is_sharded, product

Map = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """Right vectors, the best first; for convolutions also where they live, and the `scouts`."""

    y: Tensor  # shape: (blocks, columns * residues, width), complex where the map varies with the frequency
    omega: Tensor  # shape: (blocks, axes)
    scouts: Tensor  # shape: (blocks, columns * residues, grid)


class Triple(NamedTuple):
    """A singular triple as a low-rank direction: sigma = <left right^T, W> is the gain, and that is its gradient."""

    sigma: Tensor  # shape: (blocks,)
    left: Tensor  # shape: (blocks, rows, rank)
    right: Tensor | None  # shape: (blocks, columns * taps, rank); None: `left` is the direction itself


def step(matrices: Tensor, block: Block, depth: int = 1, onward: int | None = None) -> tuple[Block, Triple]:
    """Advance the block in its Krylov space of that depth and return the best triple that it holds.

    `matrices` has shape (blocks, rows, columns), in float32, float64 or complex.
    """
    left, pulled = krylov(
        lambda y: multiply(matrices, y), lambda x: multiply(matrices.mH, x), block.y, depth, onward=onward
    )
    pulled, scale = scaled(pulled)
    rotation = ritz_rotation(pulled)[..., : block.y.shape[-1]]
    y, lengths = normalised(pulled @ rotation)
    triple = Triple((lengths * scale)[:, 0, 0], left @ rotation[..., :1], y[..., :1].contiguous())
    return Block(y, block.omega, block.scouts), triple


def krylov(
    apply: Map,
    adjoint: Map,
    y: Tensor,
    depth: int,
    lower: Map = lambda image: image,
    onward: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Orthonormal left vectors that span A y, A A* A y, ..., and their images under the adjoint.

    All vectors take the first power, and the first `onward` of them the others.

    The largest gain over that space is far above that of as many power iterations, for the same products (Golub and
    Underwood, The block Lanczos method, 1977). Householder's factorisation keeps the basis orthonormal where
    another power adds nothing, as for a weight of low rank. `lower` takes an image to the space of y.
    """
    left = torch.linalg.qr(apply(y))[0]
    images = last = adjoint(left)
    for _ in range(depth - 1):
        known = left.shape[-1]
        if known >= min(left.shape[1], y.shape[1]):
            break
        more = apply(unit_columns(lower(last[..., :onward])))
        left, turned = torch.linalg.qr(torch.cat([left, more], -1))
        last = adjoint(left[..., known:])
        images = torch.cat([images @ turned[..., :known, :known].mH, last], -1)
    return left, images


def look(matrices: Tensor, right: Tensor) -> Triple:
    """The gain that a right vector sees as it is: one product, and no vector moves."""
    image = multiply(matrices, right)
    gain = torch.linalg.vector_norm(image, dim=(1, 2), keepdim=True)
    return Triple(gain.flatten(), image / _nonzero(gain), right)


def look_in_turn(matrices: Tensor, triple: Triple, *, back: bool) -> Triple:
    """The gain that the right vector sees as it is, which moves the left one, or back: two are a power iteration.

    A weight of zeros moves neither.
    """
    seen, moved = (triple.left, triple.right) if back else (triple.right, triple.left)
    assert seen is not None and moved is not None
    found = look(matrices.mH if back else matrices, seen)
    some_are_zero = host_waits(seen) or min(found.sigma.tolist()) <= 0  # on an accelerator they may be
    moved = torch.where(found.sigma[:, None, None] > 0, found.left, moved) if some_are_zero else found.left
    return Triple(found.sigma, seen, moved) if back else Triple(found.sigma, moved, seen)


def scaled(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return each block with entries up to one, and the scale: so that nothing over- or underflows later."""
    parts = torch.view_as_real(y).flatten(2) if y.is_complex() else y
    scale = _nonzero(parts.abs().amax((1, 2), keepdim=True))
    return y / scale, scale


def normalised(y: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return unit columns, or rows, and their lengths, shape (blocks, 1, width); zero columns stay zero."""
    if y.is_complex():  # several times faster as real numbers
        lengths = torch.linalg.vector_norm(torch.view_as_real(y), dim=(dim, 3)).unsqueeze(dim)
    else:
        lengths = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
    return y / _nonzero(lengths), lengths


def ritz_rotation(y: Tensor) -> Tensor:
    """The rotation of orthonormal left vectors that makes the first, on CPUs all, of them Ritz vectors; y is scaled."""
    gram = y.mH @ y
    if host_waits(gram):
        return leading_rotation(gram)
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(-1)


def unit_columns(y: Tensor) -> Tensor:
    """Columns of length one; zero columns stay zero."""
    return normalised(y)[0]


def _nonzero(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return `matrix @ vectors`, where only the vectors may be complex, in one pass over a real matrix.

    The vectors are the rows of the product that is computed, each in one piece: on the CPU that is several times faster
    for a few vectors, and a single block goes past the batched kernels.
    """
    if vectors.is_complex() and not matrix.is_complex():
        parts = torch.view_as_real(vectors).permute(0, 3, 2, 1)  # shape: (blocks, 2, width, columns)
        return torch.complex(*_rows(matrix, parts.flatten(1, 2).contiguous()).chunk(2, 1)).mT
    return _rows(matrix, vectors.mT.contiguous()).mT


def _rows(matrix: Tensor, rows: Tensor) -> Tensor:
    if is_sharded(matrix):
        return product(matrix, rows.mT).mT
    if len(matrix) > 1:
        return rows @ matrix.mT
    return torch.mm(rows.squeeze(0), matrix.squeeze(0).t()).unsqueeze(0)


def converge(matrices: Tensor, width: int, *, tolerance: float = 1e-4, most: int = 60) -> tuple[Block, Triple]:
    """Start afresh, by Lanczos with full reorthogonalisation, and iterate until the gain stops growing.

    The start depends on nothing but the shape. Host decisions are free here: it runs once.
    """
    blocks, rows, columns = matrices.shape
    vector = random_like(matrices, (blocks, columns, 1), as_complex=False)
    basis, image = [], []
    for _ in range(min(columns, rows, 32)):
        basis.append(unit_columns(vector))
        image.append(multiply(matrices, basis[-1]))
        vector = multiply(matrices.mH, unit_columns(image[-1]))
        known = torch.cat(basis, -1)
        for _ in range(2):
            vector = vector - known @ (known.mH @ vector)
    images = torch.cat(image, -1)
    right = torch.linalg.svd(images / _nonzero(images.abs().amax((1, 2), keepdim=True)), full_matrices=False)[2]
    y = torch.cat(basis, -1) @ right.mH[..., : min(width, rows, columns)]
    block = Block(y, y.real.new_zeros(blocks, 0), vector[..., :0])
    return iterate(lambda block: step(matrices, block), block, tolerance=tolerance, most=most)


def iterate(
    advance: Callable[[Block], tuple[Block, Triple]], block: Block, *, tolerance: float, most: int, least: int = 1
) -> tuple[Block, Triple]:
    """Advance until the gain grows by less than a tenth of the tolerance."""
    block, triple = advance(block)
    for done in range(1, most):
        before = triple.sigma
        block, triple = advance(block)
        if done >= least and not bool((triple.sigma > before * (1 + tolerance / 10)).any()):
            break
    return block, triple


def random_like(like: Tensor, shape: tuple[int, ...], *, as_complex: bool) -> Tensor:
    """Gaussian vectors that are the same in every process."""
    generator = torch.Generator().manual_seed(0)
    real = like.real.dtype if like.is_complex() else like.dtype
    wanted = like.dtype if like.is_complex() else torch.promote_types(real, torch.complex64) if as_complex else real
    if wanted.is_complex:
        pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        return torch.complex(pair[0], pair[1]).to(like.device, wanted)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like.device, wanted)
