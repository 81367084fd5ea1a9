"""Tier 0: compositions multiply, sums add, concatenation is the root of the sum of squares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import (
    Convolution,
    Gather,
    LinearMap,
    Matrix,
    Scale,
    TransposedConvolution,
    Weights,
    stored,
)
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.norms import norm
from opnorm.norms.fourier import torus_flops, torus_norm
from opnorm.operators import Conv, ConvTranspose, Dense, LinearOperator

_RTOL = 1e-3
_SMALL = 1024
_DEAR = 1e11
"""Flops of a convolution's symbol on its torus, a few seconds, from which on a coarser grid has to do."""
_COARSE_RTOL = 0.1


@dataclass(frozen=True)
class Naive:
    """The naive rules' result.

    Attributes:
        constants: of each step on its own: how much it can stretch what it reads.
        bounds: of each step as a function of the network's inputs.
        total: of the outputs together.
        fused: of steps that are better taken together with the one that they read: what both can stretch.
    """

    constants: tuple[float, ...]
    bounds: tuple[float, ...]
    total: float
    fused: dict[int, float]


def naive(program: Program, weights: Weights) -> Naive:
    """Bound every step by the constants of its sources, rounded upward.

    A scale right after a convolution or a matrix that nothing else reads (BatchNorm) is multiplied into it before
    its norm is taken.
    """
    weights = {**weights, **program.constants}
    readers = program.readers()
    known: dict[tuple[LinearMap, ...], float] = {}
    constants: list[float] = []
    fused: dict[int, float] = {}
    for position, step in enumerate(program.steps):
        constants.append(_once(known, (step.map,), weights) if isinstance(step, Linear) else _own_constant(step))
        before = program.steps[step.sources[0]] if len(step.sources) == 1 else None
        alone = before is not None and readers[step.sources[0]] == [position] and step.sources[0] not in program.outputs
        if alone and isinstance(step, Linear) and isinstance(before, Linear) and _fusible(before.map, step.map):
            fused[position] = _once(known, (before.map, step.map), weights)
    bounds = composed(program, constants, fused)
    return Naive(tuple(constants), tuple(bounds), root_of_squares([bounds[i] for i in program.outputs]), fused)


def composed(
    program: Program, constants: Sequence[float], fused: Mapping[int, float], added: Mapping[int, float] | None = None
) -> list[float]:
    """How far each step can move, by the naive rules.

    Args:
        program: what the network computes.
        constants: of each step on its own.
        fused: of steps with the one that they read.
        added: how far steps move by themselves where the inputs do not: errors of a computation, say. Without it the
            inputs move by 1, and the results are Lipschitz constants.
    """
    bounds: list[float] = []
    for position, step in enumerate(program.steps):
        bound = _combined(step, constants[position], [bounds[i] for i in step.sources], 1.0 if added is None else 0.0)
        if position in fused:
            (middle,) = step.sources
            own = rounding.mul_up(constants[position], added.get(middle, 0.0)) if added else 0.0
            start = bounds[program.steps[middle].sources[0]]
            bound = min(bound, rounding.add_up(rounding.mul_up(fused[position], start), own))
        bounds.append(rounding.add_up(bound, added.get(position, 0.0)) if added else bound)
    return bounds


def _own_constant(step: Step) -> float:
    if isinstance(step, Elementwise):
        return float(torch.maximum(step.low.abs(), step.high.abs()).max())
    if isinstance(step, Opaque):
        return step.constant
    if isinstance(step, Sum) and len(step.sources) == 1:
        return abs(step.coefficients[0])
    assert isinstance(step, Input | Sum | Concat)
    return 1.0


def _combined(step: Step, constant: float, sources: list[float], start: float) -> float:
    if isinstance(step, Input):
        return start
    if isinstance(step, Sum):
        terms = (rounding.mul_up(abs(c), k) for c, k in zip(step.coefficients, sources, strict=True))
        return rounding.add_up(*terms)
    if isinstance(step, Concat):
        return root_of_squares(sources)
    return rounding.mul_up(constant, root_of_squares(sources))


def root_of_squares(values: Sequence[float]) -> float:
    """Rounded upward."""
    if len(values) == 1:
        return values[0]
    if any(math.isinf(v) for v in values):
        return math.inf
    scale = max(values) or 1.0
    return rounding.mul_up(scale, rounding.sqrt_up(rounding.add_up(*(_square_up(v / scale) for v in values))))


def _square_up(ratio: float) -> float:
    above = rounding.up(ratio) if ratio else 0.0  # a constant network's bound is 0 itself
    return rounding.mul_up(above, above)


def _fusible(first: LinearMap, second: LinearMap) -> bool:
    if not isinstance(second, Scale) or second.in_shape != first.out_shape:
        return False
    channels = isinstance(first, Convolution) and second.axis == 0
    if not isinstance(first, Matrix):
        return channels
    rows = math.prod(first.out_shape) // first.before
    return first.after == 1 and second.axis == len(second.in_shape) - 1 and second.in_shape[-1] == rows


def _once(known: dict[tuple[LinearMap, ...], float], maps: tuple[LinearMap, ...], weights: Weights) -> float:
    if maps not in known:
        known[maps] = map_norm(maps[0], weights) if len(maps) == 1 else _fused_norm(maps[0], maps[1], weights)
    return known[maps]


def map_norm(linear: LinearMap, weights: Weights) -> float:
    """A proved upper bound of the norm of a linear map."""
    if isinstance(linear, Scale):
        return rounding.mul_up(float(linear.factors(weights).abs().max()), 1 + (linear.units + 2) * 2 * rounding.U)
    if isinstance(linear, Gather):
        index = weights[linear.index].to(torch.int64)
        copies = torch.bincount(index[index >= 0]) if bool((index >= 0).any()) else torch.zeros(1)
        return rounding.sqrt_up(float(copies.max()))
    upper = _measured(operator_of(linear, weights))
    return upper if linear.units == 0 else _with_error(upper, linear, weights, linear.units)


def _measured(operator: LinearOperator) -> float:
    """A proved upper bound at the cost of one pass: large convolutions by their symbol, the rest as sharp as can be."""
    if not isinstance(operator, Conv | ConvTranspose):
        return norm(operator, rtol=_RTOL).upper
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    if conv.groups == 1 and not any(conv.reach) and (conv.mode == "zeros" or conv.padded == conv.sizes):
        # The same matrix at every position: neither the stride nor zeros around the image add to its norm.
        return norm(Dense(conv.weight.flatten(1)), rtol=_RTOL).upper
    if max(operator.in_size, operator.out_size) <= _SMALL:
        return norm(operator, rtol=_RTOL).upper
    if conv.mode == "zeros" and torus_flops(operator) > _DEAR:
        return norm(_of_every_size(operator), rtol=_COARSE_RTOL).upper
    return torus_norm(operator, rtol=_RTOL, search=False).upper


def _of_every_size(operator: Conv | ConvTranspose) -> Conv | ConvTranspose:
    if isinstance(operator, ConvTranspose):
        return replace(operator, conv=replace(operator.conv, spatial=None), spatial=None)
    return replace(operator, spatial=None)


def _fused_norm(first: LinearMap, scale: LinearMap, weights: Weights) -> float:
    """The norm of a scale after a convolution or a matrix, as one map with rounded entries."""
    assert isinstance(first, Convolution | Matrix) and isinstance(scale, Scale)
    factors = scale.factors(weights)
    kernel = stored(weights, first.weight)
    fused = kernel * factors.expand(kernel.shape[0]).reshape(-1, *([1] * (kernel.dim() - 1)))
    scaled = replace(first, weight="fused", rounded=first.rounded + scale.units + 2)
    local = {"fused": fused}
    return _with_error(_measured(operator_of(scaled, local)), scaled, local, scaled.units)


def _with_error(upper: float, linear: LinearMap, weights: Weights, units: int) -> float:
    """Add what entries that are off by `units` of 2^-53 can change: that much of the norm of the absolute values."""
    assert isinstance(linear, Convolution | Matrix)
    kernel = stored(weights, linear.weight)
    size = float(torch.linalg.vector_norm(kernel.flatten(0, 1) if kernel.dim() > 2 else kernel))
    taps = math.prod(kernel.shape[2:])
    # The absolute values' norm is at most the sum of the taps' Frobenius norms, at most sqrt(taps) of all of them.
    majorant = rounding.mul_up(size, rounding.sqrt_up(float(taps)), 1 + 1e-9)
    if isinstance(linear, Convolution) and linear.circular:
        majorant = rounding.mul_up(majorant, math.prod(1 + a + b for a, b in linear.padding))
    return rounding.add_up(upper, rounding.mul_up(majorant, (units + 1) * 2 * rounding.U))


def operator_of(linear: LinearMap, weights: Weights) -> LinearOperator:
    """The operator whose norm a map has; `before` and `after` of a matrix do not change its norm."""
    if isinstance(linear, Matrix):
        return Dense(stored(weights, linear.weight))
    if isinstance(linear, Convolution):
        mode: Literal["circular", "zeros"] = "circular" if linear.circular else "zeros"
        return Conv(
            stored(weights, linear.weight),
            linear.in_shape[1:],
            linear.stride,
            linear.padding,
            linear.dilation,
            linear.groups,
            mode,
        )
    assert isinstance(linear, TransposedConvolution)
    conv = Conv(
        stored(weights, linear.weight),
        linear.out_shape[1:],
        linear.stride,
        tuple((p, p) for p in linear.padding),
        linear.dilation,
        linear.groups,
    )
    return ConvTranspose(conv, linear.in_shape[1:], linear.output_padding)
