"""The l1 and linf norms of a convolution for every input size: sums of absolute taps."""

import torch

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.errors import ArgumentError
from opnorm.norms.lp import INFINITY, L1, Order
from opnorm.norms.scaling import normalised
from opnorm.operators import Conv


def row_sum_norm(conv: Conv, order: Order, *, rtol: float) -> Enclosure:
    """Enclose the l1 or the linf norm of a convolution for every input size, with proof.

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
    if order == INFINITY:
        sums, terms = modulus.flatten(1).sum(1), modulus[0].numel()
    elif order == L1:
        blocks = torch.stack(modulus.chunk(conv.groups))  # shape: (groups, c_out / groups, c_in / groups, *kernel)
        sums, terms = blocks.flatten(3).sum((1, 3)).flatten(), blocks[0, :, 0].numel()
    else:
        raise ArgumentError(f"ord={order} of a convolution depends on its input size; give input_shape")
    value = float(sums.max())
    slack = rounding.up(1 + rounding.gamma(terms + 8))
    strided = order == L1 and max(conv.stride) > 1
    lower = 0.0 if strided else rounding.ldexp_down(rounding.div_down(value, slack), exponent)
    upper = rounding.ldexp_up(rounding.mul_up(value, slack), exponent)
    return Enclosure(lower, upper, "proved", "entries", rtol, note="supremum over all input sizes")
