"""Operators with weights of the order of one, so that applying them neither over- nor underflows."""

import math
from dataclasses import replace

import torch

from opnorm import _rounding as rounding
from opnorm.norms.scaling import normalised
from opnorm.operators import Composed, Conv, ConvTranspose, Dense, Diagonal, LinearOperator, Scaled


def rescaled(operator: LinearOperator) -> tuple[LinearOperator, int]:
    """Return `(scaled, exponent)` with `operator = scaled * 2**exponent`, weights in float64 or complex128.

    Each stored weight is scaled as `normalised` does. What stores no weight comes back as it is.
    """
    match operator:
        case Dense() | Conv():
            weight, exponent = normalised(operator.weight)
            return replace(operator, weight=weight), exponent
        case ConvTranspose():
            weight, exponent = normalised(operator.conv.weight)
            return replace(operator, conv=replace(operator.conv, weight=weight)), exponent
        case Diagonal():
            scale, exponent = normalised(operator.scale)
            return replace(operator, scale=scale), exponent
        case Scaled():
            inner, exponent = rescaled(operator.operator)
            shift = operator.factor.numerator.bit_length() - operator.factor.denominator.bit_length()
            factor = operator.factor / 2**shift if shift >= 0 else operator.factor * 2**-shift
            return Scaled(inner, factor), exponent + shift
        case Composed():
            parts = [rescaled(part) for part in operator.parts]
            return Composed(tuple(part for part, _ in parts)), sum(exponent for _, exponent in parts)
        case _:
            return operator, 0


def lost_to_underflow(operator: LinearOperator) -> float:
    """Return a bound of the spectral norm of what underflow takes from the matrix of a rescaled operator.

    A stored weight is never so small that copying it loses anything; products of weights may be. An operation loses
    at most 2**-1022, an entry of a part takes few, and the parts that follow multiply it by their row sums at most.
    """
    if isinstance(operator, Scaled):
        return rounding.mul_up(4.0, rounding.add_up(lost_to_underflow(operator.operator), _per_part(operator.operator)))
    if not isinstance(operator, Composed):
        return 0.0
    growth = 1.0
    for part in operator.parts:
        ones = torch.ones(1, *part.in_shape, dtype=torch.float64, device=operator.device)
        row_sum = float(part.absolute().apply(ones).max()) if part.in_size and part.out_size else 0.0
        inner = part.operator if isinstance(part, Scaled) else part
        nested = math.ldexp(lost_to_underflow(inner), 1022)
        growth = rounding.mul_up(growth, rounding.add_up(1.0, 2 * row_sum, (8.0 * (part.terms + 8)) ** 3, nested))
    return rounding.mul_up(_size(operator), math.ldexp(growth, -1022), float(len(operator.parts)))


def _per_part(operator: LinearOperator) -> float:
    return rounding.mul_up(_size(operator), rounding.TINY)


def _size(operator: LinearOperator) -> float:
    """The spectral norm of a matrix of ones."""
    return rounding.sqrt_up(float(operator.in_size) * float(operator.out_size))
