"""Convolutions by a block-banded Cholesky factorisation over the rows of the image: tight where dense is too large."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import BlockFactor, factor_block_tridiagonal, require_ieee_arithmetic
from opnorm.errors import ArgumentError
from opnorm.norms.attained import attained
from opnorm.norms.closing import Factored, close_in
from opnorm.norms.lanczos import lanczos
from opnorm.norms.materialised import majorant_norm, matrix_of
from opnorm.norms.memory import require_memory
from opnorm.norms.scaling import normalised
from opnorm.operators import Conv, ConvTranspose, Dense

_STEPS = 48
_FAINT = 2.0**-200
"""Squared gains below it, beside taps of the order of one, are left to the sums of absolute entries."""


def banded_norm(operator: Conv | ConvTranspose, *, rtol: float) -> Enclosure:
    """Enclose the norm of a convolution at its input size by one banded factorisation, with proof.

    Two rows of the image are coupled in `T^H T` only within the reach of the kernel, so with the rows gathered in
    pieces of that height the Gram matrix is block tridiagonal. Cost: rows / reach factorisations of blocks of
    `channels * reach * width` numbers.

    Args:
        operator: ungrouped, any stride and dilation; zero, reflect or replicate padding; a transposed one by the
            convolution that it is the adjoint of.
        rtol: target for the gap.

    Raises:
        ArgumentError: where `banded_fits` says no.
        TooLargeError: if the blocks do not fit into memory.
    """
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    if conv.groups != 1 or not banded_fits(operator):
        raise ArgumentError(
            "the banded proof takes no circular padding, which couples the first row to the last, and no "
            "output_padding of a stride or more; use method='auto'"
        )
    require_ieee_arithmetic()
    scaled, exponent = normalised(conv.weight)
    if not scaled.any():
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    conv = replace(conv, weight=scaled)
    row = conv.in_size // conv.sizes[0]
    height = max(1, conv.reach[0])
    pieces = -(-conv.sizes[0] // height)
    require_memory(8 * (row * height) ** 2 * (4 * pieces + 4), "the banded proof of this convolution")
    gram, error = _row_grams(conv)
    largest = max(float(block.diagonal().abs().max()) for (i, j), block in gram.items() if i == j)
    if largest <= _FAINT:
        # A small input may see only taps that vanish, or nearly.
        upper = rounding.ldexp_up(majorant_norm(conv), exponent)
        return Enclosure(0.0, upper, "proved", "entries", rtol)
    noise = (error + 8 * rounding.U * conv.in_size * largest) / largest

    def factored(t: float) -> Factored | None:
        found = factor_block_tridiagonal(*_pieces(gram, conv.sizes[0], row, height, t))
        if found is None:
            return None
        # Each diagonal entry of t I - G is rounded once.
        rounded = rounding.mul_up(2 * rounding.U, rounding.add_up(t, largest))
        ceiling = rounding.add_up(t, -found.floor, error, rounded)
        return Factored(ceiling, lambda v: _solve(found, v.reshape(conv.in_shape).movedim(1, 0), conv.in_shape))

    lower, ceiling = close_in(
        lambda v: attained(conv, v.reshape(conv.in_shape) / torch.linalg.vector_norm(v)),
        factored,
        _search(conv, rtol),
        shift=max(1.6 * rtol, 4 * noise),
    )
    upper = rounding.sqrt_up(ceiling)
    return Enclosure(rounding.ldexp_down(lower, exponent), rounding.ldexp_up(upper, exponent), "proved", "banded", rtol)


def banded_fits(operator: Conv | ConvTranspose) -> bool:
    """Whether the Gram matrix is banded and of the operator's own norm, group by group."""
    if isinstance(operator, ConvTranspose):
        return operator.in_shape == operator.conv.out_shape
    return operator.mode != "circular"


def banded_cost(operator: Conv | ConvTranspose) -> tuple[float, float]:
    """About how many floating-point operations, over all groups, and bytes `banded_norm` takes."""
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    height = max(1, conv.reach[0])
    block = float(conv.in_size // (conv.groups * conv.sizes[0]) * height)
    pieces = -(-conv.sizes[0] // height)
    rows = conv.out_size / (conv.groups * conv.out_shape[1])
    products = 2 * (conv.kernel[0] * block / height) ** 2 * rows
    return conv.groups * (pieces * 10 / 3 * block**3 + products), 8 * block**2 * (2 * pieces + 4)


def _row_grams(conv: Conv) -> tuple[dict[tuple[int, int], Tensor], float]:
    """The blocks `(i, j)`, `j <= i`, of the Gram matrix that couple row i of the image to row j, and their error."""
    taps = [_tap_matrix(conv, j) for j in range(conv.kernel[0])]
    products = {(a, b): taps[a].mH @ taps[b] for a in range(len(taps)) for b in range(len(taps))}
    source = _sources(conv)
    gram: dict[tuple[int, int], Tensor] = {}
    for p in range(conv.out_shape[1]):
        reads = [(j, source[p * conv.stride[0] + j * conv.dilation[0]]) for j in range(conv.kernel[0])]
        for a, i in reads:
            for b, j in reads:
                if 0 <= j <= i:
                    gram[i, j] = gram[i, j] + products[a, b] if (i, j) in gram else products[a, b]
    row = taps[0].shape[1]
    for i in range(conv.sizes[0]):
        gram.setdefault((i, i), torch.zeros(row, row, dtype=taps[0].dtype, device=conv.device))
    majorant = conv.absolute()
    ones = torch.ones(1, *conv.in_shape, dtype=torch.float64, device=conv.device)
    with torch.no_grad():
        reach = float(majorant.adjoint(majorant.apply(ones)).max())
    summed = taps[0].shape[0] + conv.entry_terms * 4 + conv.kernel[0] ** 2 * (1 + max(conv.padding[0])) + 8
    constant = rounding.gamma(2 * summed) * (2 if conv.dtype.is_complex else 1)
    reach = rounding.mul_up(reach, 1 + rounding.gamma(2 * (majorant.terms + conv.out_size)))
    return gram, rounding.add_up(rounding.mul_up(constant, reach), 1e-290)


def _tap_matrix(conv: Conv, j: int) -> Tensor:
    """The map from one row of the image to one row of the result through the kernel's j-th row."""
    weight = conv.weight[:, :, j]
    if conv.dims == 1:
        return matrix_of(Dense(weight))
    line = replace(
        conv,
        weight=weight,
        spatial=conv.sizes[1:],
        stride=conv.stride[1:],
        padding=conv.padding[1:],
        dilation=conv.dilation[1:],
    )
    return matrix_of(line)


def _sources(conv: Conv) -> list[int]:
    """Which row of the image each padded row repeats; -1 for a row of zeros."""
    rows = torch.arange(conv.sizes[0], dtype=torch.float64)[None, None]
    mode = "constant" if conv.mode == "zeros" else conv.mode
    padded = torch.nn.functional.pad(rows + 1, conv.padding[0], mode=mode)
    return [int(v) - 1 for v in padded.flatten()]


def _pieces(
    gram: dict[tuple[int, int], Tensor], rows: int, row: int, height: int, t: float
) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The diagonal and the lower blocks of `t I - G`, with rows gathered in pieces of `height`, made when asked for."""
    sample = gram[0, 0]

    def block(first: int, second: int) -> Tensor:
        tall, wide = (min(height, rows - start) for start in (first, second))
        out = torch.zeros(tall * row, wide * row, dtype=sample.dtype, device=sample.device)
        for i in range(tall):
            for j in range(wide):
                low = (first + i, second + j)
                if low in gram:
                    out[i * row : (i + 1) * row, j * row : (j + 1) * row] = -gram[low]
        if first == second:
            out.diagonal().add_(t)
        return out

    starts = range(0, rows, height)
    return (block(s, s) for s in starts), (block(s + height, s) for s in starts[:-1])


def _solve(factor: BlockFactor, image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse applied to an image whose axis of rows comes first; the result is flat, channels first."""
    widths = [block.shape[0] for block in factor.diagonal]
    parts = [part[:, None] for part in torch.split(image.flatten(), widths)]
    for i, block in enumerate(factor.diagonal):
        if i:
            parts[i] = parts[i] - factor.below[i - 1] @ parts[i - 1]
        parts[i] = torch.linalg.solve_triangular(block, parts[i], upper=False)
    for i in reversed(range(len(parts))):
        if i + 1 < len(parts):
            parts[i] = parts[i] - factor.below[i].mH @ parts[i + 1]
        parts[i] = torch.linalg.solve_triangular(factor.diagonal[i].mH, parts[i], upper=True)
    rows_first = (shape[1], shape[0], *shape[2:])
    return torch.cat(parts).reshape(rows_first).movedim(1, 0).flatten()


def _search(conv: Conv, rtol: float) -> Tensor:
    """An approximate top right singular vector, by a short Lanczos run; the factors take over from there."""
    kind = torch.complex128 if conv.dtype.is_complex else torch.float64
    start = torch.randn(conv.in_size, generator=torch.Generator().manual_seed(conv.in_size), dtype=kind)
    with torch.no_grad():
        return lanczos(
            lambda v: conv.adjoint(conv.apply(v.reshape(1, *conv.in_shape))).flatten(),
            start.to(conv.device),
            steps=_STEPS,
            tolerance=0.1 * rtol,
        ).vector
