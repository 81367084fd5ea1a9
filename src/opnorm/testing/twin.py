"""Dense twins: the matrix of a function, column by column, and its largest singular value by LAPACK."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

ORACLE = 1e-12
"""Far above the relative error of LAPACK's largest singular value for the sizes that a twin can have."""


def dense_twin(function: Callable[[Tensor], Tensor], in_shape: tuple[int, ...], *, is_complex: bool = False) -> Tensor:
    """Return the matrix of a linear or affine function of batches, shape (out_size, in_size), in double precision.

    Args:
        function: takes (batch, *in_shape) in float64 or complex128; a bias is removed as f(x) - f(0).
        in_shape: the shape of one sample.
        is_complex: apply it to complex128 unit vectors.

    Example:
        >>> import torch
        >>> from opnorm.testing import dense_twin
        >>> dense_twin(lambda x: 2 * x.flip(-1) + 1, (2,))
        tensor([[0., 2.],
                [2., 0.]], dtype=torch.float64)
    """
    size = prod(in_shape)
    units = torch.eye(size, dtype=torch.complex128 if is_complex else torch.float64).reshape(size, *in_shape)
    with torch.no_grad():
        images = function(units) - function(torch.zeros_like(units))
    return images.reshape(size, -1).mT.contiguous()


def singular_value(matrix: Tensor) -> float:
    """Return the largest singular value, by LAPACK on entries scaled to at most one; 0 for an empty matrix.

    Example:
        >>> import torch
        >>> from opnorm.testing import singular_value
        >>> singular_value(torch.tensor([[3e-300, 4e-300]], dtype=torch.float64))
        5e-300
    """
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0.0:
        return 0.0
    return float(torch.linalg.svdvals(matrix / largest)[0]) * largest
