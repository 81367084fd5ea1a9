"""Norms that are read off the structure of a map: diagonal, permuting, separable, scaled."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import torch

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.errors import ArgumentError
from opnorm.norms.dense import dense_norm
from opnorm.norms.gram import cheap_bound
from opnorm.norms.scaling import normalised
from opnorm.operators import Composed, Diagonal, Isometry, LinearOperator, Permutation, Scaled, Separable

STRUCTURED = (Composed, Diagonal, Isometry, Permutation, Scaled, Separable)

Measure = Callable[[LinearOperator], Enclosure]


def structured_norm(operator: LinearOperator, measure: Measure, *, rtol: float) -> Enclosure:
    """Enclose the norm of a map whose structure gives it, with the guarantee of its parts.

    A composition is bounded from above by the product of its parts' norms; its lower end is 0 unless something else
    attains more.

    Args:
        operator: one of `STRUCTURED`.
        measure: how to enclose the norm of a part.
        rtol: target for the gap.

    Raises:
        ArgumentError: for an operator without such a structure.
    """
    match operator:
        case Diagonal():
            return _diagonal(operator, rtol)
        case Permutation():
            return Enclosure(1.0, 1.0, "proved", "structured", rtol)
        case Isometry():
            gain = float(operator.squared_gain)
            return Enclosure(rounding.sqrt_down(gain), rounding.sqrt_up(gain), "proved", "structured", rtol)
        case Separable():
            return _separable(operator, rtol)
        case Scaled():
            factor = float(abs(operator.factor))
            part = measure(operator.operator)
            exact = operator.factor == type(operator.factor)(float(operator.factor))
            low, high = (factor, factor) if exact else (rounding.down(factor), rounding.up(factor))
            lower, upper = rounding.mul_down(part.lower, low), rounding.mul_up(part.upper, high)
            return replace(part, lower=lower, upper=upper, rtol=rtol)
        case Composed():
            product = reduce(lambda a, b: a * b, map(measure, operator.parts))
            return Enclosure(0.0, product.upper, product.guarantee, "product", rtol, product.failure_probability)
        case _:
            raise ArgumentError(f"method='structured' does not know {type(operator).__name__}")


def _diagonal(operator: Diagonal, rtol: float) -> Enclosure:
    """The largest modulus; only a complex one, and an inexact scale, are rounded."""
    scaled, exponent = normalised(operator.scale)
    largest = float(scaled.abs().max()) if scaled.numel() else 0.0
    lower, upper = largest, largest
    if scaled.is_complex():
        lower, upper = (
            rounding.div_down(largest, 1 + rounding.gamma(8)),
            rounding.mul_up(largest, 1 + rounding.gamma(8)),
        )
    if operator.scale_error:
        lower = rounding.mul_down(lower, rounding.down(1 - operator.scale_error))
        upper = rounding.mul_up(upper, rounding.up(1 + operator.scale_error))
    lower, upper = rounding.ldexp_down(lower, exponent), rounding.ldexp_up(upper, exponent)
    return Enclosure(lower, upper, "proved", "structured", rtol)


def _separable(operator: Separable, rtol: float) -> Enclosure:
    """The norm of a Kronecker product is the product of the norms, each proved on a matrix of one axis."""
    if operator.channels == 0:
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    share = rtol / (2 * len(operator.factors))
    product = Enclosure(1.0, 1.0, "proved", "structured", rtol)
    for factor in operator.factors:
        slack = rounding.mul_up(operator.factor_error, cheap_bound(factor)) if operator.factor_error else 0.0
        part = dense_norm(factor.to(torch.float64), rtol=share, slack=slack)
        product = Enclosure(
            rounding.mul_down(product.lower, part.lower),
            rounding.mul_up(product.upper, part.upper),
            "proved",
            "structured",
            rtol,
        )
    return product
