"""Convolutions by their own matrices, group by group, and by the sums of their taps."""

from dataclasses import replace

import torch

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.errors import ArgumentError
from opnorm.norms.lp import Order
from opnorm.norms.materialised import majorant_norm, materialised_norm
from opnorm.norms.scaling import normalised
from opnorm.operators import Conv, ConvTranspose


def dense_convolution_norm(operator: Conv | ConvTranspose, *, rtol: float) -> Enclosure:
    """Enclose the norm of a convolution by the matrices of its groups, with proof; exact for every geometry.

    The norm is the maximum over the groups. They are taken in the order of a cheap bound, and those that cannot reach
    what is already attained are not factored.

    Args:
        operator: at a given input size.
        rtol: target for the gap.

    Raises:
        TooLargeError: if a group's matrix does not fit into memory.
    """  # noqa: DOC502 - raised further down
    parts = groups_of(operator)
    if len(parts) == 1:
        return materialised_norm(parts[0], rtol=rtol)
    bounds = [majorant_norm(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: -bounds[i])
    best = materialised_norm(parts[order[0]], rtol=rtol)
    for i in order[1:]:
        if bounds[i] <= best.lower:
            break
        best = Enclosure.maximum([best, materialised_norm(parts[i], rtol=rtol)])
    return best


def groups_of(operator: Conv | ConvTranspose) -> list[Conv] | list[ConvTranspose]:
    """Return the ungrouped convolutions that a grouped one consists of."""
    if isinstance(operator, ConvTranspose):
        return [replace(operator, conv=part) for part in _split(operator.conv)]
    return _split(operator)


def _split(conv: Conv) -> list[Conv]:
    return [replace(conv, weight=weight, groups=1) for weight in conv.weight.chunk(conv.groups)]


def row_sum_norm(conv: Conv, order: Order, *, rtol: float) -> Enclosure:
    """Enclose the l1 or the linf norm of a convolution for every input size: sums of absolute taps.

    For linf it is the largest sum over one output channel, attained once the input is as large as the kernel; for l1
    the largest sum over one input channel, which a stride only makes smaller.

    Args:
        conv: of no particular size.
        order: (1, 1) or (inf, inf).
        rtol: target for the gap.

    Raises:
        ArgumentError: for other orders, which depend on the size.
    """
    scaled, exponent = normalised(conv.weight)
    modulus = scaled.abs()
    if order == (float("inf"), float("inf")):
        sums, terms = modulus.flatten(1).sum(1), modulus[0].numel()
    elif order == (1, 1):
        blocks = torch.stack(modulus.chunk(conv.groups))  # shape: (groups, c_out / groups, c_in / groups, *kernel)
        sums, terms = blocks.flatten(3).sum((1, 3)).flatten(), blocks[0, :, 0].numel()
    else:
        raise ArgumentError(f"ord={order} of a convolution depends on its input size; give input_shape")
    value = float(sums.max())
    slack = rounding.up(1 + rounding.gamma(terms + 8))
    strided = order == (1, 1) and max(conv.stride) > 1
    lower = 0.0 if strided else rounding.ldexp_down(rounding.div_down(value, slack), exponent)
    upper = rounding.ldexp_up(rounding.mul_up(value, slack), exponent)
    return Enclosure(lower, upper, "proved", "entries", rtol, note="supremum over all input sizes")
