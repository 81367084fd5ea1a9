"""The matrix of a small operator, and bounds that need only the sums of its absolute entries."""

from dataclasses import replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.errors import ArgumentError
from opnorm.norms.dense import dense_norm
from opnorm.norms.lp import Order, lp_norm
from opnorm.norms.memory import VECTORS, require_memory
from opnorm.norms.rescaled import lost_to_underflow, rescaled
from opnorm.operators import Composed, Conv, ConvTranspose, LinearOperator

_BATCH_BYTES = 2**26
_OTHER_ORDERS = "orders other than 2 need it: ask at a smaller input_shape (1 and inf of a convolution need none)"


def materialised_norm(operator: LinearOperator, *, rtol: float) -> Enclosure:
    """Enclose the norm of a small operator by its matrix, with proof; exact for every geometry.

    Args:
        operator: anything that can be applied; the matrix has `out_size * in_size` elements.
        rtol: target for the gap.

    Raises:
        TooLargeError: if the matrix does not fit into memory.
        WeightError: if a weight holds NaN or infinite values.
    """
    relative = entry_error(operator)
    if not relative:
        # Copies are exact even where scaling would drop the last digits of what is subnormal.
        return dense_norm(matrix_of(operator), rtol=rtol)
    operator, exponent = rescaled(operator)
    matrix = matrix_of(operator)
    scaling = rounding.mul_up(4.0 * matrix.numel() * operator.terms, rounding.TINY)
    slack = rounding.add_up(rounding.mul_up(relative, majorant_norm(operator)), lost_to_underflow(operator), scaling)
    found = dense_norm(matrix, rtol=rtol, slack=slack)
    lower, upper = rounding.ldexp_down(found.lower, exponent), rounding.ldexp_up(found.upper, exponent)
    return replace(found, lower=lower, upper=upper)


def materialised_lp_norm(operator: LinearOperator, order: Order, *, rtol: float) -> Enclosure:
    """Enclose a norm between other spaces than l2 of a small operator by its matrix, with proof.

    Args:
        operator: anything that can be applied, but a composition.
        order: `(p_in, p_out)`.
        rtol: target for the gap.

    Raises:
        ArgumentError: for a composition, and for orders that have no bound.
        TooLargeError: if the matrix does not fit into memory.
    """
    if isinstance(operator, Composed):
        raise ArgumentError(f"ord={order} is not proved for compositions; measure the parts one by one")
    found = lp_norm(matrix_of(operator, _OTHER_ORDERS), order, rtol=rtol)
    relative = entry_error(operator)
    if not relative:
        return found
    majorant = lp_norm(matrix_of(operator.absolute(), _OTHER_ORDERS), order, rtol=rtol).upper
    # The majorant's own entries are as far off; every one of these norms is at most the sum of the entries.
    lost = rounding.mul_up(8.0 * operator.in_size * operator.out_size, rounding.TINY)
    slack = rounding.add_up(rounding.mul_up(relative, rounding.add_up(1.0, 2 * relative), majorant), lost)
    lower = max(0.0, rounding.down(found.lower - slack))
    return replace(found, lower=lower, upper=rounding.add_up(found.upper, slack))


def entry_error(operator: LinearOperator) -> float:
    """Return how far a computed entry of the matrix may be off, relative to the majorant's; 0 where it is a copy."""
    terms = operator.entry_terms
    return rounding.add_up(rounding.gamma(terms) if terms > 1 else 0.0, operator.entry_error)


def matrix_of(operator: LinearOperator, way_out: str = VECTORS) -> Tensor:
    """Return the matrix of an operator in float64 or complex128, shape (out_size, in_size), column by column.

    Args:
        operator: anything that can be applied.
        way_out: what to do where the matrix does not fit into memory.
    """
    if operator.dtype.is_complex and isinstance(operator, Conv | ConvTranspose):
        # torch convolves complex numbers by three real products, of sums that are rounded; the parts are exact.
        return torch.complex(*(matrix_of(part, way_out) for part in _parts(operator)))
    rows, columns = operator.out_size, operator.in_size
    what = f"the matrix of an operator from {operator.in_shape} to {operator.out_shape}"
    require_memory(48 * rows * columns, what, way_out)
    dtype = torch.complex128 if operator.dtype.is_complex else torch.float64
    transposed = torch.empty(columns, rows, dtype=dtype, device=operator.device)
    step = max(1, _BATCH_BYTES // (8 * (rows + columns)))
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        for first in range(0, columns, step):
            count = min(step, columns - first)
            units = torch.zeros(count, columns, dtype=dtype, device=operator.device)
            units[torch.arange(count), first + torch.arange(count)] = 1
            images = operator.apply(units.reshape(count, *operator.in_shape))
            transposed[first : first + count] = images.reshape(count, rows)
    return transposed.mT


def _parts(operator: Conv | ConvTranspose) -> tuple[LinearOperator, LinearOperator]:
    """The real and the imaginary part of a convolution."""
    if isinstance(operator, ConvTranspose):
        first, second = (replace(operator, conv=replace(operator.conv, weight=w)) for w in _halves(operator.conv))
        return first, second
    real, imag = (replace(operator, weight=w) for w in _halves(operator))
    return real, imag


def _halves(conv: Conv) -> tuple[torch.Tensor, torch.Tensor]:
    weight = conv.weight.resolve_conj()
    return weight.real.contiguous(), weight.imag.contiguous()


def majorant_norm(operator: LinearOperator) -> float:
    """Return `sqrt(|A|_1 |A|_inf)` of the majorant, rounded upward: a proved bound of the norm of any operator."""
    majorant = operator.absolute()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        row_sums = majorant.apply(torch.ones(1, *operator.in_shape, dtype=torch.float64, device=operator.device))
        column_sums = majorant.adjoint(torch.ones(1, *operator.out_shape, dtype=torch.float64, device=operator.device))
    rows = rounding.mul_up(float(row_sums.max()), 1 + rounding.gamma(majorant.terms + 8))
    columns = rounding.mul_up(float(column_sums.max()), 1 + rounding.gamma(_adjoint_terms(operator) + 8))
    inflated = rounding.add_up(1.0, operator.entry_error)
    return rounding.mul_up(rounding.sqrt_up(rounding.mul_up(rows, columns)), inflated)


def _adjoint_terms(operator: LinearOperator) -> int:
    """How many products the adjoint sums at most: a column has at most all rows; sums that follow one another add."""
    return sum(map(_adjoint_terms, operator.parts)) if isinstance(operator, Composed) else operator.out_size + 1
