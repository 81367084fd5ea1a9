"""Convolutions at every input size at once: the supremum of the symbol."""

import math
from dataclasses import replace

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import require_ieee_arithmetic
from opnorm.errors import InputShapeError
from opnorm.norms.blocks import grid_maximum
from opnorm.norms.fourier import as_conv, attained_by_search, scaled_like, symbol_flops, symbol_grid
from opnorm.norms.scaling import normalised
from opnorm.norms.supremum import supremum
from opnorm.operators import Conv, ConvTranspose

_SLACK = 4e-3
_WORK = 1.5
"""Blocks to prove, over those of a uniform grid that is 0.4 % off."""
_CHEAP_FLOPS = 1e9
_OVERHEAD_FLOPS = 1e5
"""What a block costs beside its arithmetic."""


def size_free_norm(operator: Conv | ConvTranspose, *, rtol: float) -> Enclosure:
    """Enclose the supremum of a convolution's norm over all input sizes, with proof.

    The supremum M of the symbol over continuous frequencies bounds the convolution on every input size, for every
    zero padding. It is enclosed by branch and bound over cells of frequencies.

    Args:
        operator: any zero-padded convolution, or a circular one whose output is no longer than its input; the sizes
            it may carry are not used.
        rtol: target for the gap. It is met but where the symbol is nearly constant over the frequencies and the target
            below 0.4 %: there the cost of the proof is bounded, and the gap is 0.4 % at most.

    Raises:
        InputShapeError: where no bound holds for every size: other paddings.
        WeightError: if the weight holds NaN or infinite values.
    """
    conv = as_conv(operator)
    require_ieee_arithmetic()
    wraps = conv.mode == "circular" and all(
        sum(pair) <= reach for pair, reach in zip(conv.padding, conv.reach, strict=True)
    )
    if conv.mode != "zeros" and not wraps:
        raise InputShapeError(f"{conv.mode} padding has no bound for every input size; give input_shape")
    scaled, exponent = normalised(conv.weight)
    if not scaled.any():
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    conv = replace(conv, weight=scaled)
    # Any circular convolution samples the symbol of stride 1; its strided blocks need a stride that divides n.
    bounding = _undilated(replace(conv, stride=(1,) * conv.dims) if wraps else conv)
    lower, upper = supremum(
        symbol_grid(bounding, _uniform(bounding, _slack(rtol))),
        tuple(reach / 2 for reach in bounding.reach),
        rtol=rtol,
        slack=_slack(rtol),
        budget=_budget(bounding),
    )
    note = "supremum over all input sizes"
    if conv.spatial is not None:
        lower = attained_by_search(scaled_like(operator, conv), None, rtol)
        note = "upper end for all input sizes, lower end for this one"
    elif bounding.stride != conv.stride:
        lower = grid_maximum(symbol_grid(conv, _uniform(conv, _SLACK)), rtol).lower
    return Enclosure(
        rounding.ldexp_down(lower, exponent),
        rounding.ldexp_up(upper, exponent),
        "proved",
        "size-free",
        rtol,
        note=note,
    )


def size_free_flops(operator: Conv | ConvTranspose, rtol: float) -> float:
    """About how many floating-point operations `size_free_norm` takes."""
    conv = _undilated(as_conv(operator))
    return symbol_flops(conv, math.prod(_uniform(conv, _slack(rtol))))


def _undilated(conv: Conv) -> Conv:
    """Without a stride the dilation only repeats the symbol."""
    return conv if max(conv.stride) > 1 else replace(conv, dilation=(1,) * conv.dims)


def _slack(rtol: float) -> float:
    """What the distance between frequencies may cost whatever it takes."""
    return min(max(_SLACK, rtol / 2), 0.1)


def _budget(conv: Conv) -> int:
    """How many blocks may be proved for less than the slack."""
    points = math.prod(_uniform(conv, _SLACK))
    blocks = points / math.prod(conv.stride) / (1 if conv.weight.is_complex() else 2)
    block = symbol_flops(conv, points) / blocks + conv.groups * _OVERHEAD_FLOPS
    return int(_WORK * blocks + _CHEAP_FLOPS / block)


def _uniform(conv: Conv, slack: float) -> tuple[int, ...]:
    """The coarsest uniform grid, each axis a multiple of its stride, on which the supremum is `slack` off at most."""
    axes = max(1, sum(reach > 0 for reach in conv.reach))
    angle = math.acos((1 / (1 + slack)) ** (1 / axes))
    points = (max(1, math.ceil(math.pi * reach / 2 / angle)) for reach in conv.reach)
    return tuple(-(-n // s) * s for n, s in zip(points, conv.stride, strict=True))
