"""The matrix of a small operator, and bounds that need only the sums of its absolute entries."""

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.norms.dense import dense_norm
from opnorm.norms.memory import require_memory
from opnorm.operators import LinearOperator

_BATCH_BYTES = 2**26


def materialised_norm(operator: LinearOperator, *, rtol: float) -> Enclosure:
    """Enclose the norm of a small operator by its matrix, with proof; exact for every geometry.

    Args:
        operator: anything that can be applied; the matrix has `out_size * in_size` elements.
        rtol: target for the gap.

    Raises:
        TooLargeError: if the matrix does not fit into memory.
        WeightError: if a weight holds NaN or infinite values.
    """
    matrix = matrix_of(operator)
    terms = operator.entry_terms
    relative = rounding.add_up(rounding.gamma(terms) if terms > 1 else 0.0, operator.entry_error)
    slack = rounding.mul_up(relative, majorant_norm(operator)) if relative else 0.0
    return dense_norm(matrix, rtol=rtol, slack=slack)


def matrix_of(operator: LinearOperator) -> Tensor:
    """Return the matrix of an operator in float64 or complex128, shape (out_size, in_size), column by column."""
    rows, columns = operator.out_size, operator.in_size
    require_memory(48 * rows * columns, f"the matrix of an operator from {operator.in_shape} to {operator.out_shape}")
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


def majorant_norm(operator: LinearOperator) -> float:
    """Return `sqrt(|A|_1 |A|_inf)` of the majorant, rounded upward: a proved bound of the norm of any operator."""
    majorant = operator.absolute()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        row_sums = majorant.apply(torch.ones(1, *operator.in_shape, dtype=torch.float64, device=operator.device))
        column_sums = majorant.adjoint(torch.ones(1, *operator.out_shape, dtype=torch.float64, device=operator.device))
    rows = rounding.mul_up(float(row_sums.max()), 1 + rounding.gamma(majorant.terms + 8))
    # A column is summed over at most all rows, whatever the order.
    columns = rounding.mul_up(float(column_sums.max()), 1 + rounding.gamma(operator.out_size + 8))
    inflated = rounding.add_up(1.0, operator.entry_error)
    return rounding.mul_up(rounding.sqrt_up(rounding.mul_up(rows, columns)), inflated)
