"""Lower ends: the gain at an explicit vector, its rounding error subtracted."""

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.operators import LinearOperator

_FAINT = 2.0**-400
"""An image below it may owe what it is to underflow, in the products or in their squares."""


def attained(operator: LinearOperator, x: Tensor) -> float:
    """Return a proved lower bound of `|A x| / |x|`, and so of the operator norm.

    Args:
        operator: its stored weights scaled to the order of one, in float64 or complex128.
        x: shape `in_shape` of the operator, float64 or complex128; of norm near one.

    Returns:
        The bound; 0 where the image is so faint that underflow may have made it, or is NaN.
    """
    x = x.detach()[None]
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        image = operator.apply(x)
        # |A x - fl(A x)| <= gamma |A| |x|; complex arithmetic by three real products is covered by the factor 8.
        majorant = operator.absolute().apply(x.abs())
    factor = 8.0 if image.is_complex() else 1.0
    constant = rounding.mul_up(factor, rounding.gamma(operator.terms + 8) + operator.entry_error)
    return gain_below(image, majorant, constant, x)


def gain_below(image: Tensor, majorant: Tensor, constant: float, x: Tensor) -> float:
    """Return a lower bound of `|y| / |x|`, where `y` is computed as `image` and off by `constant * majorant` at most.

    It is 0 where the image is so faint that underflow may have made it, or is NaN.
    """
    if not float(image.abs().max()) > _FAINT:
        return 0.0
    gain = rounding.down(norm_below(image) - rounding.mul_up(constant, norm_above(majorant)))
    return rounding.div_down(gain, norm_above(x)) if gain > 0 else 0.0


def norm_above(x: Tensor) -> float:
    """Return an upper bound of the Euclidean norm of all entries; they must not underflow when squared."""
    parts = torch.view_as_real(x) if x.is_complex() else x
    value = float(torch.linalg.vector_norm(parts))
    return rounding.mul_up(value, 1 + rounding.gamma(parts.numel() + 8)) + rounding.TINY


def norm_below(x: Tensor) -> float:
    """Return a lower bound of the Euclidean norm of all entries."""
    parts = torch.view_as_real(x) if x.is_complex() else x
    value = float(torch.linalg.vector_norm(parts))
    return rounding.div_down(value, rounding.up(1 + rounding.gamma(parts.numel() + 8)))
