"""The oracles of `soundness.py`: what an enclosure is held against, none of it from opnorm."""

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from exact_norm import norm_at_most  # noqa: E402
from opnorm import Enclosure  # noqa: E402

ORACLE = 1e-12
SMALLEST = 2.0**-1074
EXACT_SIDE = 5
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def against_matrix(found: Enclosure, matrix: Tensor, *, entries_exact: bool) -> tuple[str, bool]:
    """Hold an enclosure against the norm of a matrix; in integers where it is small and its entries are exact."""
    upper = math.inf if found.guarantee == "estimate" else found.upper
    if entries_exact and 0 < min(matrix.shape) <= EXACT_SIDE and matrix.any():
        if upper < math.inf and not norm_at_most(matrix, upper):
            return f"upper {upper!r} is too small", True
        if found.lower > 0 and norm_at_most(matrix, math.nextafter(found.lower, 0.0)):
            return f"lower {found.lower!r} is too large", True
        return "", True
    truth = largest_singular_value(matrix)
    return against_number(found.lower, upper, truth), False


def largest_singular_value(matrix: Tensor) -> float:
    """SciPy's, of entries brought to the order of one by an exact power of two."""
    if not matrix.any():
        return 0.0
    parts = (torch.view_as_real(matrix) if matrix.is_complex() else matrix).numpy()
    exponent = int(np.frexp(np.abs(parts).max())[1])
    scaled = np.ldexp(np.ldexp(parts, -exponent // 2), -exponent - (-exponent // 2))
    scaled = scaled[..., 0] + 1j * scaled[..., 1] if matrix.is_complex() else scaled
    return float(np.ldexp(scipy.linalg.svdvals(scaled)[0], exponent))


def against_number(lower: float, upper: float, truth: float) -> str:
    """Hold both ends against a number that is known up to `ORACLE`."""
    if lower > truth * (1 + ORACLE) + SMALLEST:
        return f"lower {lower!r} > {truth!r}"
    if upper < truth * (1 - ORACLE) - SMALLEST:
        return f"upper {upper!r} < {truth!r}"
    return ""


def against_fraction(found: Enclosure, rows: list[list[Fraction]], order: tuple[float, float]) -> str:
    """Hold the ends against sums of rational numbers; squares where a root would be taken."""
    columns = list(zip(*rows, strict=True))
    match order:
        case (1, 1):
            truth, power = max(map(sum, columns)), 1
        case (1, 2):
            truth, power = max(sum(x * x for x in column) for column in columns), 2
        case (2, math.inf):
            truth, power = max(sum(x * x for x in row) for row in rows), 2
        case (math.inf, math.inf):
            truth, power = max(map(sum, rows)), 1
        case _:
            truth, power = max(map(max, rows)), 1
    if Fraction(found.lower) ** power > truth:
        return f"lower {found.lower!r} is too large"
    if found.upper < math.inf and Fraction(found.upper) ** power < truth:
        return f"upper {found.upper!r} is too small"
    return ""


def against_vectors(found: Enclosure, matrix: Tensor, order: tuple[float, float]) -> str:
    """No vector may gain more than the upper end; from l1 and to linf the value is known."""
    p, q = order
    largest = float(matrix.abs().max())
    if largest == 0.0:
        return "" if found.upper == 0.0 else "the zero matrix has norm 0"
    scaled = matrix / largest
    lower, upper = found.lower / largest, found.upper / largest
    samples = torch.cat([torch.eye(matrix.shape[1], dtype=torch.float64), scaled, torch.randn(64, matrix.shape[1])])
    samples = samples[samples.abs().amax(1) > 0]
    samples = samples / samples.abs().amax(1, keepdim=True)
    gains = stable_norm(samples @ scaled.mT, q) / stable_norm(samples, p)
    if float(gains.max()) * (1 - 1e-9) > upper:
        return f"upper {upper!r} < {float(gains.max())!r}, attained (largest entry 1)"
    if p == 1 and lower > float(stable_norm(scaled.mT, q).max()) * (1 + 1e-10):
        return f"lower {lower!r} is above the largest column"
    dual = 1.0 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)
    if math.isinf(q) and lower > float(stable_norm(scaled, dual).max()) * (1 + 1e-10):
        return f"lower {lower!r} is above the largest row"
    return ""


def stable_norm(rows: Tensor, p: float) -> Tensor:
    """Lp norms of rows, the largest entry taken out first."""
    scale = rows.abs().amax(1).clamp_min(1e-300)
    return torch.linalg.vector_norm(rows / scale[:, None], p, dim=1) * scale


def supremum(module: nn.Module) -> tuple[float, float]:
    """Enclose the supremum of the symbol by a grid of about 60 points an axis, in NumPy; strides by aliases."""
    weight = module.weight.detach().numpy()
    dims, groups, transposed = weight.ndim - 2, module.groups, isinstance(module, TRANSPOSED)
    points = [s * (-(-(60 if dims < 3 else 14) // s)) for s in module.stride]
    largest = float(np.abs(weight).max())
    if largest == 0.0:
        return 0.0, 0.0
    axes = [np.arange(k) * d for k, d in zip(weight.shape[2:], module.dilation, strict=True)]
    waves = [np.exp(2j * np.pi * np.outer(np.arange(n), taps) / n) for n, taps in zip(points, axes, strict=True)]
    best = 0.0
    for block in np.split(weight / largest, groups):
        symbol = block.astype(complex)
        for wave in waves:  # each tap axis becomes a frequency axis at the end
            symbol = np.tensordot(symbol, wave, axes=([2], [1]))
        folded = np.moveaxis(symbol, (0, 1), (-2, -1))
        for axis, s in enumerate(module.stride):
            parts = np.split(folded, s, axis=axis)
            folded = np.concatenate(parts, axis=-1) / math.sqrt(s)
        best = max(best, float(np.linalg.svd(folded, compute_uv=False)[..., 0].max()))
    cosine = math.prod(
        math.cos(math.pi * (taps[-1] / 2) / n) if n > taps[-1] else 0.0 for taps, n in zip(axes, points, strict=True)
    )
    circular = not transposed and module.padding_mode == "circular"
    # A circular convolution is only bounded by its symbol without stride: there the upper end lies further up.
    growth = math.sqrt(math.prod(module.stride)) if circular else 1.0
    above = best * growth / cosine if cosine > 0 else math.inf
    return best * largest, above * largest
