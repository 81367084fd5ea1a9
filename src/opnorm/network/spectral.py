"""Upper bounds of the spectral norms of many small matrices at once."""

import torch
from torch import Tensor

_SQUARINGS = 4
_SLACK = 1 + 1e-9
"""Above the rounding of five products of matrices of up to a few thousand rows, each scaled to size 1."""


def spectral_up(matrices: Tensor) -> Tensor:
    """An upper bound of the largest singular value of each matrix, shape (..., r, c) -> (...).

    With G the smaller Gram matrix, `|G^16|_F^(1/32)` is the norm of the singular values with exponent 64: at most
    `min(r, c)^(1/64)` too large.
    """
    rows, columns = matrices.shape[-2:]
    size = matrices.abs().amax((-2, -1), keepdim=True) if matrices.numel() else matrices.new_zeros(())
    scaled = matrices / torch.where(size > 0, size, 1.0)
    power = scaled @ scaled.mT if rows <= columns else scaled.mT @ scaled
    found = torch.ones_like(size)
    exponent = 1.0
    for _ in range(_SQUARINGS):
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        found, power = found * norm**exponent, power / torch.where(norm > 0, norm, 1.0)
        power, exponent = power @ power, exponent / 2
    found = found * torch.linalg.matrix_norm(power, keepdim=True) ** exponent
    root = (found.sqrt() * size * _SLACK)[..., 0, 0]
    above: Tensor = root.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return above
