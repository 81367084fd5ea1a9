"""Convolutions at their input size by the Fourier symbol, on a torus that embeds them."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import require_ieee_arithmetic
from opnorm.norms.attained import attained
from opnorm.norms.blocks import Peak, grid_maximum, largest_frobenius
from opnorm.norms.lanczos import lanczos
from opnorm.norms.scaling import normalised
from opnorm.norms.symbol import Grid
from opnorm.operators import Conv, ConvTranspose

_SYMBOL_RTOL = 1e-5
_SEARCH_STEPS = 36
_CHEAP_FLOPS = 2e9


def torus_norm(operator: Conv | ConvTranspose, *, rtol: float, search: bool = True) -> Enclosure:
    """Enclose the norm of a convolution at its input size by the symbol on a torus, with proof.

    Zero padding: `T = R C_N E` with `C_N` the circular convolution on any torus of
    `N >= n + min(d (k - 1), max(padding))` points an axis, so `|T| <= |C_N|`. Circular padding: the convolution is
    `C_n` itself where the output has the size of the input and the stride divides it. Reflect and replicate padding:
    `T = V P`, the valid convolution after the padding, whose norm is the root of how often a sample is repeated.

    Args:
        operator: at a given input size.
        rtol: target for the gap; the embedding's own slack, up to a few per cent on small inputs, comes on top.
        search: whether to look for a lower end on the operator itself, and for the best of a few tori; without, the
            lower end is 0 except where the symbol is exact.

    Raises:
        InputShapeError: if the operator stands for every size.
        WeightError: if the weight holds NaN or infinite values.
    """
    conv = as_conv(operator)
    require_ieee_arithmetic()
    # The embedding's slack is given; what the symbol's own proof adds to it costs nothing to keep small.
    sharp = min(rtol, _SYMBOL_RTOL) if search else rtol
    scaled, exponent = normalised(conv.weight)
    conv = replace(conv, weight=scaled)
    if not scaled.any():
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    plain, factor = embedded(conv)
    if conv.mode == "zeros":
        lower, upper = _zero_padded(conv, scaled_like(operator, conv), sharp, search=search)
    elif plain is conv:
        peak = grid_maximum(symbol_grid(conv, conv.sizes), sharp)
        lower, upper = peak.lower, peak.upper
    else:
        lower = attained_by_search(conv, None, sharp) if search else 0.0
        if plain.mode == "circular":
            upper = grid_maximum(symbol_grid(plain, plain.sizes), sharp).upper
        else:
            upper = _zero_padded(plain, plain, sharp, search=False)[1]
        upper = rounding.mul_up(upper, factor)
    return Enclosure(rounding.ldexp_down(lower, exponent), rounding.ldexp_up(upper, exponent), "proved", "torus", rtol)


def embedded(conv: Conv) -> tuple[Conv, float]:
    """Return a convolution whose symbol is that of a torus, and a factor: their product bounds the norm of `conv`.

    Zero padding: itself. Circular padding: itself where it maps the torus to itself, else the one without stride, whose
    outputs contain those of `conv` as often as they go round. Reflect and replicate padding: the valid convolution,
    and how often a sample is repeated.
    """
    if conv.mode == "zeros":
        return conv, 1.0
    if conv.mode != "circular":
        valid = replace(conv, spatial=conv.padded, padding=((0, 0),) * conv.dims, mode="zeros")
        return valid, rounding.sqrt_up(float(math.prod(_repetitions(conv))))
    outputs = [n - reach for n, reach in zip(conv.padded, conv.reach, strict=True)]
    if all(o == n and n % s == 0 for o, n, s in zip(outputs, conv.sizes, conv.stride, strict=True)):
        return conv, 1.0
    overlap = math.prod(max(1, -(-o // n)) for o, n in zip(outputs, conv.sizes, strict=True))
    return replace(conv, stride=(1,) * conv.dims), rounding.sqrt_up(float(overlap))


def frobenius_by_group(conv: Conv) -> list[float]:
    """Return, for each group of a zero-padded convolution, a proved bound: the largest Frobenius norm of its symbol."""
    scaled, exponent = normalised(conv.weight)
    grid = symbol_grid(replace(conv, weight=scaled), torus_sizes(conv)[0])
    most = largest_frobenius(grid)
    root = rounding.down(math.sqrt(grid.aliases))
    return [
        rounding.ldexp_up(rounding.add_up(rounding.div_up(value, root), grid.error), exponent)
        for value in most.tolist()
    ]


def torus_flops(operator: Conv | ConvTranspose) -> float:
    """About how many floating-point operations `torus_norm` takes."""
    conv = as_conv(operator)
    return symbol_flops(conv, math.prod(conv.sizes if conv.mode == "circular" else torus_sizes(conv)[0]))


def symbol_flops(conv: Conv, points: int) -> float:
    """Count half the spectrum, for each block a symbol, a Gram matrix by real products and a complex factorisation."""
    rows, columns = conv.weight.shape[0] // conv.groups, conv.weight.shape[1] * math.prod(conv.stride)
    side, length = min(rows, columns), max(rows, columns)
    block = 4.0 * rows * columns * math.prod(conv.kernel) + 6.0 * side * side * length + 4 / 3 * side**3
    return block * conv.groups * points / (2 * math.prod(conv.stride))


def as_conv(operator: Conv | ConvTranspose) -> Conv:
    """Return the convolution with the same norm or a larger one; a transposed one is its adjoint on its output."""
    return operator.conv if isinstance(operator, ConvTranspose) else operator


def scaled_like(operator: Conv | ConvTranspose, conv: Conv) -> Conv | ConvTranspose:
    """Return the operator with another convolution inside."""
    return replace(operator, conv=conv) if isinstance(operator, ConvTranspose) else conv


def symbol_grid(conv: Conv, sizes: tuple[int, ...]) -> Grid:
    """Return the symbol of a convolution on a torus."""
    weight = conv.weight
    axes = [torch.arange(k, device=weight.device) * d for k, d in zip(conv.kernel, conv.dilation, strict=True)]
    offsets = torch.cartesian_prod(*axes).reshape(-1, conv.dims)
    kernel = weight.reshape(conv.groups, weight.shape[0] // conv.groups, weight.shape[1], -1)
    return Grid(kernel, offsets, sizes, conv.stride)


def _zero_padded(
    conv: Conv, operator: Conv | ConvTranspose, rtol: float, *, search: bool = True
) -> tuple[float, float]:
    """The best of a few tori that embed the convolution, and what the operator itself attains."""
    best: tuple[Peak, Grid] | None = None
    for sizes in torus_sizes(conv)[: None if search else 1]:
        grid = symbol_grid(conv, sizes)
        peak = grid_maximum(grid, rtol)
        if best is None or peak.upper < best[0].upper:
            best = peak, grid
        rows, columns = grid.block_shape
        if len(grid.frequencies) * min(rows, columns) ** 2 * max(rows, columns) > _CHEAP_FLOPS:
            break
    if best is None:
        raise AssertionError("torus_sizes yields at least one torus")
    peak, grid = best
    start = _wave(conv, grid, peak) if search else None
    return (attained_by_search(operator, start, rtol) if search else 0.0), peak.upper


def torus_sizes(conv: Conv) -> list[tuple[int, ...]]:
    """Return a few tori, smallest first, that embed a zero-padded convolution of a given input size."""
    least = [n + min(reach, max(0, *pads)) for n, reach, pads in zip(conv.sizes, conv.reach, conv.padding, strict=True)]
    tori = [tuple(_round_up(n + more, s) for n, s in zip(least, conv.stride, strict=True)) for more in range(3)]
    return sorted(set(tori))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _repetitions(conv: Conv) -> list[int]:
    """How often, per axis, the padding repeats the sample that it repeats most; multiplicities multiply."""
    most = []
    for n, (left, right) in zip(conv.sizes, conv.padding, strict=True):
        line = torch.arange(n, dtype=torch.float64)[None, None]
        padded = torch.nn.functional.pad(line, (left, right), mode=conv.mode)
        most.append(int(torch.bincount(padded.flatten().to(torch.int64)).max()))
    return most


def _wave(conv: Conv, grid: Grid, peak: Peak) -> Tensor | None:
    """The torus' best plane wave under a half-sine window: a start that is nearly optimal on the true domain."""
    if conv.groups != grid.kernel.shape[0] or conv.weight.is_complex():
        return None
    frequencies = grid.alias_frequencies(peak.frequency[None])[0]  # shape: (aliases, d)
    c_in = conv.weight.shape[1]
    amplitudes = peak.vector.reshape(grid.aliases, c_in)
    sample = torch.zeros(conv.in_shape, dtype=torch.complex128, device=conv.device)
    channels = slice(peak.group * c_in, (peak.group + 1) * c_in)
    for amplitude, frequency in zip(amplitudes, frequencies, strict=True):
        wave = torch.ones((), dtype=torch.complex128, device=conv.device)
        for f, n, size in zip(frequency.tolist(), grid.sizes, conv.sizes, strict=True):
            position = torch.arange(size, device=conv.device, dtype=torch.float64)
            window = torch.sin(math.pi * (position + 1) / (size + 1))
            wave = wave[..., None] * torch.polar(window, math.tau * f / n * position)
        sample[channels] += amplitude.reshape(-1, *(1,) * conv.dims) * wave
    return torch.view_as_real(sample).select(-1, int(sample.imag.norm() > sample.real.norm()))


def attained_by_search(operator: Conv | ConvTranspose, start: Tensor | None, rtol: float) -> float:
    """Return what the scaled operator attains at the end of a short Lanczos run; float32 where the weight is real."""
    if isinstance(operator, ConvTranspose):
        begin = None if start is None else operator.adjoint(start[None])[0]
    else:
        begin = start
    shape = operator.in_shape
    generator = torch.Generator().manual_seed(operator.in_size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.device)
    size = torch.linalg.vector_norm(noise)
    length = 0.0 if begin is None else float(torch.linalg.vector_norm(begin))
    # The adjoint may map the wave to zero.
    begin = noise / size if begin is None or length == 0.0 else begin / length + 1e-2 * noise / size
    kind = torch.complex128 if operator.dtype.is_complex else torch.float32

    def gram(v: Tensor) -> Tensor:
        return operator.adjoint(operator.apply(v.reshape(1, *shape))).flatten()

    with torch.no_grad():
        tolerance = max(rtol, 1e-4)
        found = lanczos(gram, begin.to(kind).flatten(), steps=_SEARCH_STEPS, tolerance=tolerance)
    wide = found.vector.to(torch.complex128 if operator.dtype.is_complex else torch.float64)
    return attained(operator, wide.reshape(shape))
