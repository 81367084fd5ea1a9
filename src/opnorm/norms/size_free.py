"""Convolutions at every input size at once: the supremum of the symbol."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.certificate.posdef import require_ieee_arithmetic
from opnorm.errors import InputShapeError
from opnorm.norms.fourier import as_conv, attained_by_search, scaled_like, symbol_grid
from opnorm.norms.polyphase import polyphase
from opnorm.norms.scaling import normalised
from opnorm.norms.supremum import supremum
from opnorm.norms.symbol import Grid
from opnorm.operators import Conv, ConvTranspose

_SLACK = 4e-3
_WORK = 6.0
"""Blocks to prove, over those of a uniform grid that is 0.4 % off; they cost less than its blocks one by one."""
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
    bounding = replace(conv, stride=(1,) * conv.dims) if wraps else conv
    lower, upper = _supremum(bounding, rtol)
    note = "supremum over all input sizes"
    if conv.spatial is not None:
        lower = attained_by_search(scaled_like(operator, conv), None, rtol)
        note = "upper end for all input sizes, lower end for this one"
    elif bounding.stride != conv.stride:
        lower, _ = _supremum(conv, rtol)
    return Enclosure(
        rounding.ldexp_down(lower, exponent),
        rounding.ldexp_up(upper, exponent),
        "proved",
        "size-free",
        rtol,
        note=note,
    )


def size_free_flops(operator: Conv | ConvTranspose) -> float:
    """About how many floating-point operations `size_free_norm` takes, at most."""
    conv = as_conv(operator)
    grid = symbol_grid(conv, conv.stride)
    kernel, offsets = polyphase(torch.ones_like(grid.kernel), grid.offsets, conv.stride)
    return _budget(kernel, offsets) * _block_flops(kernel, offsets)


def _supremum(conv: Conv, rtol: float) -> tuple[float, float]:
    grid = symbol_grid(conv, conv.stride)
    kernel, offsets = polyphase(grid.kernel, grid.offsets, conv.stride)
    types, slack = _types(offsets), min(max(_SLACK, rtol / 2), 0.1)
    uniform = Grid(kernel, offsets, _uniform(types, slack), (1,) * conv.dims)
    return supremum(uniform, types, rtol=rtol, slack=slack, budget=int(_budget(kernel, offsets)))


def _types(offsets: Tensor) -> tuple[float, ...]:
    """Half the reach along each axis."""
    return tuple(reach / 2 for reach in offsets.amax(0).tolist())


def _budget(kernel: Tensor, offsets: Tensor) -> float:
    """How many blocks to prove."""
    blocks = math.prod(_uniform(_types(offsets), _SLACK)) / (1 if kernel.is_complex() else 2)
    return _WORK * blocks + _CHEAP_FLOPS / _block_flops(kernel, offsets)


def _block_flops(kernel: Tensor, offsets: Tensor) -> float:
    """A Gram matrix from the autocorrelation, a complex factorisation at a part of the speed, and what each costs."""
    groups, rows, columns, _ = kernel.shape
    side = min(rows, columns)
    lags = math.prod(4 * tau + 1 for tau in _types(offsets)) / 2
    return groups * (8 * lags * side**2 + 4 * side**3 + _OVERHEAD_FLOPS)


def _uniform(types: tuple[float, ...], slack: float) -> tuple[int, ...]:
    """The coarsest uniform grid on which the supremum is `slack` off at most."""
    axes = max(1, sum(tau > 0 for tau in types))
    angle = math.acos((1 / (1 + slack)) ** (1 / axes))
    return tuple(max(1, math.ceil(math.pi * tau / angle)) for tau in types)
