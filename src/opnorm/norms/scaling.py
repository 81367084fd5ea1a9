"""Exact scaling by a power of two, so that nothing over- or underflows on the way to a bound."""

import math

import torch
from torch import Tensor

from opnorm.errors import WeightError


def widened(weight: Tensor) -> Tensor:
    """Return the weight in float64 or complex128, exactly.

    Raises:
        WeightError: if the dtype is no floating-point one.
    """
    weight = weight.detach()
    if weight.is_complex():
        return weight.to(torch.complex128).resolve_conj()
    if not weight.is_floating_point():
        raise WeightError(
            f"a weight of dtype {weight.dtype} has no operator norm here; convert it to a floating-point dtype first "
            "(dequantise it, where it is quantised)"
        )
    return weight.to(torch.float64)


def largest_part(weight: Tensor) -> float:
    """Return the largest absolute value of a real or imaginary part; NaN where there is one."""
    parts = torch.view_as_real(weight.resolve_conj()) if weight.is_complex() else weight
    if parts.numel() == 0:
        return 0.0
    low, high = torch.aminmax(parts)
    return max(-float(low), float(high)) if float(low) == float(low) else math.nan


def normalised(weight: Tensor) -> tuple[Tensor, int]:
    """Return `(scaled, exponent)` with `weight = scaled * 2**exponent` and the largest part in [0.5, 1).

    `scaled` is float64 or complex128. The scaling is exact but for parts more than 2**1021 times smaller than the
    largest, which lose at most 2**-1074. A zero weight comes back as it is.

    Raises:
        WeightError: if the weight holds NaN or infinite values, or is not of a floating-point dtype.
    """
    wide = widened(weight)
    parts = torch.view_as_real(wide) if wide.is_complex() else wide
    if parts.numel() == 0:
        return wide, 0
    largest = largest_part(wide)
    if not math.isfinite(largest):
        raise WeightError("the weight holds NaN or infinite values; no norm encloses them")
    if largest == 0.0:
        return wide, 0
    exponent = math.frexp(largest)[1]
    # In two steps, because 2**1074 itself is no float.
    half = -exponent // 2
    scaled = parts * math.ldexp(1.0, half)
    scaled.mul_(math.ldexp(1.0, -exponent - half))
    return (torch.view_as_complex(scaled) if wide.is_complex() else scaled), exponent
