"""The weight that is deployed: divided by a proved upper bound, and still within it after rounding to its dtype."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm._enclosure import Enclosure
from opnorm.errors import WeightError
from opnorm.norms import measure
from opnorm.norms.casting import Mode, scale_to_bound
from opnorm.operators import Conv, ConvTranspose, Dense, LinearOperator
from opnorm.parametrize import on_device, sharding, values
from opnorm.parametrize.views import View, with_weight
from opnorm.parametrize.watched import counted

DENSE_RTOL = 1e-6
CONV_RTOL = 1e-3
SIZE_FREE_RTOL = 1e-4
"""What training and evaluation differ by at least where the bound is for every input size."""


class Deployed(NamedTuple):
    """A deployed weight, and what tells whether it is still that of the raw one."""

    key: values.Key
    bits: tuple[int, ...]
    lipschitz: float
    value: Tensor


def up_to_date(
    view: View,
    weight: Tensor,
    lipschitz: float,
    mode: Mode,
    label: str,
    *,
    key: values.Key,
    before: Deployed | None,
    verify: bool,
) -> Deployed:
    """Return the deployed weight: `before` itself where nobody wrote to the raw one, otherwise a new one.

    With `verify`, or where writes may go unnoticed, every bit of the raw weight is compared.

    Raises:
        WeightError: if the weight holds NaN or infinite values.
    """
    if before is not None and before.lipschitz == lipschitz:
        if not sharding.agreed(weight, verify or not key.watched or key != before.key):
            return before
        alike = before.value.device == weight.device and before.key.kind == key.kind
        alike = alike and sharding.lie_alike(before.value, weight)
        same = alike and values.fingerprint(weight) == before.bits
        if not sharding.agreed(weight, not same):
            return before._replace(key=key)
    with counted(), torch.no_grad(), on_device.without_autocast(weight), on_device.outside_transforms():
        whole = deploy(view, sharding.gathered(weight), lipschitz, mode, label)
        value = sharding.as_before(whole, weight)
    return Deployed(key, values.fingerprint(weight), lipschitz, value)


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
