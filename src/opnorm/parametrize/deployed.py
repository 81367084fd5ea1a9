"""The weight that is deployed: divided by a proved upper bound, and still within it after rounding to its dtype."""

from functools import partial

import torch
from torch import Tensor

from opnorm._enclosure import Enclosure
from opnorm.errors import WeightError
from opnorm.norms import measure
from opnorm.norms.casting import Mode, scale_to_bound
from opnorm.operators import Conv, ConvTranspose, Dense, LinearOperator
from opnorm.parametrize.views import View, with_weight

DENSE_RTOL = 1e-6
CONV_RTOL = 1e-3
SIZE_FREE_RTOL = 1e-4
"""What training and evaluation differ by at least where the bound is for every input size."""


def deploy(view: View, weight: Tensor, lipschitz: float, mode: Mode, label: str) -> Tensor:
    """Return `K W / upper(W)` in the weight's dtype; the norm of what is returned is proved to be at most K.

    In mode "clip" a weight that is proved to be within K is returned as it is. Zero stays zero.

    Raises:
        WeightError: if the weight holds NaN or infinite values.
    """
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(
            f"{label} holds NaN or infinite values, so it has no norm to divide by; repair the weights (nothing else "
            "was changed)"
        )
    weight = weight.detach()
    if not isinstance(view.template, Dense):
        operator = with_weight(view.template, weight)
        exact = isinstance(operator, Conv) and operator.mode in {"reflect", "replicate"}
        measured = partial(_conv_norm, view) if exact else None
        return scale_to_bound(weight, enclose(operator), lipschitz, mode, measure=measured)
    parts = view.matrices(weight)
    scaled = [scale_to_bound(part, enclose(Dense(part)), lipschitz, mode) for part in parts]
    return view.weight(torch.stack(scaled), weight.shape)


def enclose(operator: LinearOperator) -> Enclosure:
    """The proved enclosure by which a weight is divided."""
    if isinstance(operator, Dense):
        return measure(operator, DENSE_RTOL)
    every_size = isinstance(operator, Conv | ConvTranspose) and operator.spatial is None
    return measure(operator, SIZE_FREE_RTOL if every_size else CONV_RTOL)


def enclosures(view: View, weight: Tensor) -> list[Enclosure]:
    """The proved enclosures of the norms that a weight has in this view, one for each block with a norm of its own."""
    if isinstance(view.template, Dense):
        return [enclose(Dense(part)) for part in view.matrices(weight.detach())]
    return [enclose(with_weight(view.template, weight.detach()))]


def _conv_norm(view: View, weight: Tensor) -> Enclosure:
    return enclose(with_weight(view.template, weight))
