"""Scaling a weight so that what is stored, after rounding to its dtype, obeys the bound in exact arithmetic."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import require_ieee_arithmetic
from opnorm.errors import ArgumentError, WeightError

Mode = Literal["divide", "clip"]

_HALF_ROUTE = 2.0**-23  # torch may cast float64 to the 16-bit types by way of float32
_ATTEMPTS = 8


def scale_to_bound(
    weight: Tensor,
    enclosure: Enclosure,
    lipschitz: float = 1.0,
    mode: Mode = "divide",
    *,
    measure: Callable[[Tensor], Enclosure] | None = None,
) -> Tensor:
    """Scale `weight` to operator norm at most `lipschitz`, as stored in its own dtype.

    Rounding `K * W / sigma` entry by entry can raise the norm above K again. Without `measure` the factor is chosen
    so small that no rounding can: `c = (K - e sqrt(mn)) / (upper + u B)`, with u the unit roundoff and e the spacing
    of subnormal numbers of the dtype, and B a bound of the norm of `|W|`. With `measure` larger factors are tried
    first, and one is taken when the rounded weight measures at most K; that is tighter, and for convolutions with
    reflect or replicate padding it is the only way, as B is not a bound for them.

    Args:
        weight: a matrix (m, n), or a convolution kernel (c_out, c_in, *taps); floating or complex, finite.
        enclosure: of the operator norm of `weight`; its upper end is relied on.
        lipschitz: K > 0.
        mode: `divide` scales every weight to K (a zero weight stays zero); `clip` only those whose upper end is above.
        measure: the enclosure of a scaled and rounded weight.

    Returns:
        A tensor of the same shape, dtype and device; `weight` itself, detached, where nothing has to change.
        Its norm is at most `lipschitz` with the guarantee of the enclosure (of `measure`, where given).

    Raises:
        ArgumentError: if K is not a positive finite number, `mode` is unknown, or the dtype cannot hold a weight of
            that norm.
        WeightError: if the weight is not finite or not floating-point, or `measure` never stays within K.

    Source:
        `|cast(c W) - c W| <= c u |W| + e/2` entry by entry, and the norm is monotone in entrywise majorants.

    Example:
        >>> import torch
        >>> from opnorm import Enclosure
        >>> half = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float16)
        >>> scale_to_bound(half, Enclosure(4.0, 4.0, "proved", "by hand"), lipschitz=1.0)
        tensor([[0.7495, 0.0000],
                [0.0000, 0.9995]], dtype=torch.float16)
    """
    _check(weight, enclosure, lipschitz, mode)
    weight = weight.detach()
    if not bool(weight.any()) or (mode == "clip" and enclosure.upper <= lipschitz):
        return weight
    mantissa, exponent = math.frexp(enclosure.upper)
    real = torch.view_as_real(weight.resolve_conj()) if weight.is_complex() else weight
    home = torch.device("cpu") if weight.device.type == "mps" else weight.device
    unit = _times_power_of_two(real.to(home, torch.float64), -exponent)  # its norm is at most `mantissa`

    def stored(factor: float) -> Tensor:
        scaled = (unit * factor).to(real.dtype)
        result = torch.view_as_complex(scaled) if weight.is_complex() else scaled
        return _usable(result.to(weight.device), lipschitz)

    safe = _safe_factor(unit, weight, mantissa, lipschitz)
    if measure is None:
        return stored(safe)
    roundoff = torch.finfo(weight.dtype).eps / 2
    factor = lipschitz / mantissa * (1 - roundoff / 64)
    for attempt in range(_ATTEMPTS):
        candidate = stored(factor)
        upper = measure(candidate).upper
        if upper <= lipschitz:
            return candidate
        factor *= lipschitz / upper * (1 - roundoff * 2.0 ** (attempt - 4))
    candidate = stored(min(safe, factor))
    if measure(candidate).upper <= lipschitz:
        return candidate
    raise WeightError(
        f"no scaling of the weight measures at most {lipschitz:g} after rounding to {weight.dtype}; "
        "check that `measure` is the norm of which `enclosure` is the enclosure"
    )


def _check(weight: Tensor, enclosure: Enclosure, lipschitz: float, mode: str) -> None:
    require_ieee_arithmetic()
    if not 0.0 < lipschitz < math.inf:
        raise ArgumentError(f"lipschitz must be a positive finite number, got {lipschitz!r}")
    if mode not in ("divide", "clip"):
        raise ArgumentError(f"mode is 'divide' or 'clip', got {mode!r}")
    if weight.ndim < 2:
        raise ArgumentError(f"a weight of shape {tuple(weight.shape)} is neither a matrix nor a convolution kernel")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise WeightError(f"weights of dtype {weight.dtype} cannot be scaled")
    if not bool(torch.isfinite(weight).all()) or math.isinf(enclosure.upper):
        raise WeightError("the weight holds NaN or infinite values, or its norm has no finite bound")
    if enclosure.upper == 0.0 and bool(weight.any()):
        raise ArgumentError("the enclosure says that the norm is 0, but the weight is not zero")


def _safe_factor(unit: Tensor, weight: Tensor, upper: float, lipschitz: float) -> float:
    """A factor after which no rounding can lift the norm above `lipschitz`; 0 where the dtype allows none."""
    info = torch.finfo(weight.dtype)
    roundoff = rounding.add_up(info.eps / 2, _HALF_ROUTE if info.bits == 16 else 0.0, 2 * rounding.U)
    spacing = info.smallest_normal * info.eps * (2 if weight.is_complex() else 1)
    moduli = torch.linalg.vector_norm(unit, dim=-1) if weight.is_complex() else unit.abs()
    # The norm of a convolution is at most that of the matrix of moduli, summed over the taps.
    taps = math.prod(weight.shape[2:])
    summed = moduli.reshape(*weight.shape[:2], taps).sum(-1)
    reach = rounding.mul_up(rounding.sqrt_up(float(weight.shape[0] * weight.shape[1])), float(taps))
    majorant = _norm_above(summed, roundings=weight.numel() + 8)
    room = rounding.down(lipschitz - rounding.mul_up(spacing, reach))
    # The last term is what the power of two can have lost to underflow.
    denominator = rounding.add_up(upper, rounding.mul_up(roundoff, majorant), rounding.mul_up(rounding.TINY, reach))
    return rounding.div_down(room, denominator) if room > 0.0 else 0.0


def _norm_above(matrix: Tensor, *, roundings: int) -> float:
    """An upper bound of the spectral norm of a non-negative matrix whose sums take at most that many roundings."""
    rows, columns = float(matrix.sum(1).amax()), float(matrix.sum(0).amax())
    plain = min(float(torch.linalg.vector_norm(matrix)), math.sqrt(rows) * math.sqrt(columns))
    return rounding.mul_up(plain, rounding.add_up(1.0, rounding.gamma(2 * roundings)))


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    half = exponent // 2  # in two steps, as 2.0**-1080 is no float64
    return x * 2.0**half * 2.0 ** (exponent - half)


def _usable(candidate: Tensor, lipschitz: float) -> Tensor:
    if not bool(torch.isfinite(candidate).all()):
        raise ArgumentError(
            f"{candidate.dtype} cannot hold a weight of norm {lipschitz:g}: its largest number is "
            f"{torch.finfo(candidate.dtype).max:g}; choose a smaller lipschitz or a wider dtype"
        )
    if not bool(candidate.any()):
        raise ArgumentError(
            f"{candidate.dtype} cannot hold a weight of norm {lipschitz:g}: every entry would be rounded to zero; "
            "choose a larger lipschitz or a wider dtype"
        )
    return candidate
