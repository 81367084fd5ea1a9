"""Proofs that the norm of a stored weight is at most a bound; they share the Cholesky lemma with the search, no more.

Everything is computed in float64 on the CPU, on weights scaled by a power of two so that the bound lies in [1/2, 1).
`sigma(X) < b` follows when `t I - fl(X X^H)` factorises and `t`, the lemma's loss and the error of the product add up
to at most `b^2`. The errors are a-priori ones, valid for any order of summation:

* product over m terms: `gamma_m |X| |X|^H` entry by entry, complex `sqrt(2) gamma_2m`, plus underflow;
* shift: `2 u (t + max |fl(X X^H)|)` for one subtraction on the diagonal.

A convolution of every size has the norm `M = sup_w sigma(K^(w))`, `K^(w) = sum_j K_j exp(i j.w)`. If a cell with
centre c and half-widths rho holds a maximiser and `a = sum_i rho_i (k_i - 1) / 2 < pi/2`, then `M <= sigma(c) / cos a`:
for the maximising u and v, `u^H K^ v` is, after centring the taps, of exponential type (k - 1) / 2 per axis, and the
inequality of Bernstein and Szego (`|q'|^2 + tau^2 q^2 <= tau^2 M^2`) keeps it above `M cos a` between maximiser and
centre. So `M <= b` once `sigma(c) <= b cos a` is proved for cells that cover the torus; cells that fail are halved.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.format import MAX_GRID, Reading
from opnorm.certificate.posdef import SQRT2, eigenvalue_floor, require_ieee_arithmetic

CHUNK = 2**27
"""Bytes that one step of a proof may take for its largest temporary."""

FREQUENCIES = 2**18
"""How many frequencies of one kernel are looked at before the verifier gives up."""

PI = rounding.up(math.pi)


def reading_of_kernel(shape: tuple[int, ...], depth: int = 7) -> Reading:
    """Return how the verifier shall search the frequencies of a kernel (c_out, c_in, *taps): coarse cells, halvings."""
    axes = len(shape) - 2
    grid = tuple(1 if taps == 1 else 2 ** math.ceil(math.log2(2 * axes * (taps - 1) + 2)) for taps in shape[2:])
    return Reading("convolution", grid=tuple(min(n, MAX_GRID) for n in grid), depth=depth)


def proves(weight: Tensor, reading: Reading, bound: float) -> bool:
    """Try to prove that the norm of `weight`, read as said, is at most `bound`.

    Args:
        weight: floating or complex, as stored.
        reading: the linear map that it stands for.
        bound: at least 0 and finite.

    Returns:
        True if it was proved; False if it does not hold, or holds by too little to be proved.

    Raises:
        ArithmeticModeError: if the processor flushes subnormal numbers to zero.

    Example:
        >>> import torch
        >>> from opnorm.certificate.format import Reading
        >>> proves(torch.eye(3), Reading("matrix"), 1.0001), proves(torch.eye(3), Reading("matrix"), 0.9999)
        (True, False)
    """
    require_ieee_arithmetic()
    weight = weight.detach().cpu().resolve_conj().resolve_neg()
    if not bool(torch.isfinite(weight).all()):
        return False
    if not bool(weight.any()):
        return bound >= 0.0
    largest = float((torch.view_as_real(weight) if weight.is_complex() else weight).abs().amax())
    if not largest <= bound < math.inf:  # no entry can exceed the norm; after this, none is above 1 when scaled
        return False
    target, exponent = math.frexp(bound)
    if reading.kind != "convolution":
        parts = torch.split(weight, list(reading.rows)) if reading.kind == "blocks" else [weight]
        return all(_matrix_within(part.reshape(part.shape[-2:]), exponent, target) for part in parts)
    return _kernel_within(_scaled(weight, exponent), reading, target)


def _scaled(weight: Tensor, exponent: int) -> Tensor:
    """`weight / 2**exponent` in float64; an entry loses at most `TINY`, to underflow."""
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    half = -exponent // 2  # in two steps, as 2.0**1074 is no float64
    return wide * 2.0**half * 2.0 ** (-exponent - half)


def _matrix_within(weight: Tensor, exponent: int, target: float) -> bool:
    """Whether `sigma(weight) <= target * 2**exponent`, in slabs along the longer side."""
    rows = weight if weight.shape[0] <= weight.shape[1] else weight.mT  # the transpose has the same norm
    short, long = rows.shape
    dtype = torch.complex128 if weight.is_complex() else torch.float64
    gram = torch.zeros(1, short, short, dtype=dtype)
    majorant = torch.zeros(1, short, dtype=torch.float64)
    step = max(1, CHUNK // (16 * short))
    for start in range(0, long, step):
        slab = _scaled(rows[:, start : start + step], exponent)[None]
        gram += slab @ slab.mH
        majorant += _absolute_row_sums(slab)
    lost = rounding.mul_up(rounding.sqrt_up(float(short * long)), 2 * rounding.TINY)
    return bool(_grams_within(gram, majorant, long, rounding.down(target - lost)))


def _absolute_row_sums(x: Tensor) -> Tensor:
    """`|x| |x|^T 1` up to its own rounding, shape (batch, n, m) -> (batch, n)."""
    moduli = x.abs()
    return (moduli @ moduli.sum(-2)[..., None])[..., 0]


def _grams_within(gram: Tensor, majorant: Tensor, terms: int, target: float) -> Tensor:
    """Whether `sigma(X) <= target`, from `gram = fl(X X^H)`, sums over `terms`, and the row sums of `|X| |X|^T`.

    The entries of X are at most 1 in modulus per real part. Shapes (batch, n, n), (batch, n) -> (batch,).
    """
    n = gram.shape[-1]
    if target <= 0.0:
        return torch.zeros(gram.shape[0], dtype=torch.bool)
    wide = 2 if gram.is_complex() else 1
    outward = 1 + rounding.gamma(wide * (terms + n) + 32)
    constant = rounding.mul_up(SQRT2 if wide == 2 else 1.0, rounding.gamma(wide * terms))
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real if gram.is_complex() else gram.diagonal(dim1=-2, dim2=-1)
    square = rounding.mul_down(target, target)
    error = majorant.amax(-1) * (constant * outward) + 8 * n * (terms + 1) * rounding.TINY
    error = (error + 2 * rounding.U * (square + diagonal.abs().amax(-1))) * (1 + 8 * rounding.U)
    # Room for the lemma's loss, at most its constant times the trace; whether it was enough is checked below.
    room = 3 * (wide * rounding.gamma(2 * n + 8) * n * square + error)
    shift = square - room
    possible = shift > 0
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(torch.where(possible, shift, 0.0)[:, None])
    floor = eigenvalue_floor(shifted)
    total = (shift - floor + error) * (1 + 8 * rounding.U)
    return possible & (total <= square)


def _kernel_within(kernel: Tensor, reading: Reading, target: float) -> bool:
    """Whether the convolution with `kernel`, shape (c_out, c_in, *taps), has norm at most `target` on every input."""
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1)
    offsets = torch.tensor(list(product(*map(range, kernel.shape[2:]))), dtype=torch.float64)  # shape: (taps, axes)
    taps = kernel.flatten(2).permute(2, 0, 1).contiguous()  # shape: (taps, n, m)
    lost = _symbol_error(taps)
    if math.prod(reading.grid) > FREQUENCIES:
        return False
    cells = _coarse_cells(reading.grid, halved=not kernel.is_complex())
    seen, sizes = 0, kernel.shape[2:]
    for level in range(reading.depth + 1):
        counts = [n << level if size > 1 else n for n, size in zip(reading.grid, sizes, strict=True)]
        reach = (rounding.mul_up((size - 1) / 2, PI, 1 / n) for size, n in zip(sizes, counts, strict=True))
        angle = rounding.add_up(*reach)
        seen += len(cells)
        if seen > FREQUENCIES:
            return False
        centres = (2 * cells + 1).to(torch.float64) / torch.tensor([2.0 * n for n in counts], dtype=torch.float64)
        # The cosine of the machine is off by a few units in the last place; pi / 2 may be passed on coarse cells.
        cosine = 1.0 if angle == 0.0 else math.cos(angle) - 4 * rounding.U if angle < 1.5 else 0.0
        needed = rounding.down(rounding.mul_down(target, max(0.0, cosine)) - lost)
        failed = []
        for part in _split(len(cells), taps):
            symbols = _symbols(taps, offsets, centres[part])
            gram, majorant = symbols @ symbols.mH, _absolute_row_sums(symbols)
            bad = ~_grams_within(gram, majorant, symbols.shape[-1], needed)
            # Where even the centre cannot be proved to be within the bound, no refinement will help.
            if not bool(_grams_within(gram[bad], majorant[bad], symbols.shape[-1], rounding.down(target - lost)).all()):
                return False
            failed.append(cells[part][bad])
        cells = torch.cat(failed)
        if not len(cells):
            return True
        cells = _halves(cells, [size > 1 for size in sizes])
    return False


def _coarse_cells(grid: tuple[int, ...], *, halved: bool) -> Tensor:
    """The indices of all cells, shape (cells, axes); for real kernels one of each pair w, -w is enough."""
    ranges = [range(n) for n in grid]
    first = next((axis for axis, n in enumerate(grid) if n > 1), None)
    if halved and first is not None:
        ranges[first] = range(grid[first] // 2)
    return torch.tensor(list(product(*ranges)), dtype=torch.int64).reshape(-1, len(grid))


def _halves(cells: Tensor, splits: list[bool]) -> Tensor:
    """Both halves of every cell along the axes that split."""
    for axis, split in enumerate(splits):
        if split:
            left = cells.clone()
            left[:, axis] *= 2
            right = left.clone()
            right[:, axis] += 1
            cells = torch.cat([left, right])
    return cells


def _split(count: int, taps: Tensor) -> Iterator[slice]:
    number, n, m = taps.shape
    step = max(1, CHUNK // (16 * (2 * number + 3 * n * m + 3 * n * n)))
    return (slice(start, start + step) for start in range(0, count, step))


def _symbols(taps: Tensor, offsets: Tensor, centres: Tensor) -> Tensor:
    """`sum_j K_j exp(2 pi i j.r)` for r in `centres`, shape (frequencies, axes) -> (frequencies, n, m), complex128.

    The centres are dyadic, so that `j.r` modulo 1 is exact; the angle is then off by 2 pi u and its cosine by a few u.
    """
    turns = centres @ offsets.mT
    angles = (turns - turns.round()) * (2 * math.pi)
    cosines, sines = angles.cos(), angles.sin()
    flat = taps.flatten(1)
    if not flat.is_complex():
        parts = torch.stack([cosines @ flat, sines @ flat], -1)
    else:
        re, im = flat.real, flat.imag
        pair = torch.cat([re, im])
        parts = torch.stack([torch.cat([cosines, -sines], 1) @ pair, torch.cat([sines, cosines], 1) @ pair], -1)
    return torch.view_as_complex(parts).reshape(-1, *taps.shape[1:])


def _symbol_error(taps: Tensor) -> float:
    """How far the norm of a computed symbol can be off, underflow in scaling the kernel included.

    Real and imaginary part are sums of at most 2 |taps| products with factors that are off by less than 16 u.
    """
    number, n, m = taps.shape
    summed = taps.abs().sum(0)
    rows, columns = float(summed.sum(1).amax()), float(summed.sum(0).amax())
    plain = min(float(torch.linalg.vector_norm(summed)), math.sqrt(rows) * math.sqrt(columns))
    size = rounding.mul_up(plain, 1 + rounding.gamma(number + 2 * n * m + 16))
    underflow = rounding.mul_up(8.0 * (number + 1), rounding.sqrt_up(float(n * m)), rounding.TINY)
    return rounding.add_up(rounding.mul_up(2.0, rounding.gamma(2 * number + 48), size), underflow)
