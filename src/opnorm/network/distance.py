"""How far the elements of a tensor can be from their values at the centre of a region, and the rounding of those.

All numbers are rounded upward, underflow included: a distance is 0 only where nothing can move.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Gather, LinearMap, Scale, Weights
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Step, Sum
from opnorm.certificate.network.region import Around, norm_up
from opnorm.certificate.network.stages import concat_order, per_element
from opnorm.network.normalisation import Normalisation


@dataclass(frozen=True, eq=False)
class Distance:
    """From the values at the centre: of each element, and of the whole tensor in the Euclidean norm."""

    each: Tensor
    total: float

    @staticmethod
    def of(each: Tensor, total: float) -> "Distance":
        """Both, the smaller of what they say of each other."""
        each = each.nan_to_num(nan=math.inf, posinf=math.inf).clamp(max=total)
        return Distance(each, min(total, norm_up(each)))

    def __add__(self, other: "Distance") -> "Distance":
        """One after the other."""
        each = torch.where((self.each > 0) | (other.each > 0), (self.each + other.each) * (1 + 4 * rounding.U), 0.0)
        return Distance.of(each, rounding.add_up(self.total, other.total))

    def within(self, value: Tensor, doubt: Tensor, low: Tensor, high: Tensor) -> "Distance":
        """The same where the elements are known to lie in [low, high], the centre's within `doubt` of `value`."""
        farthest = (torch.maximum(high - value, value - low) + doubt) * (1 + 8 * rounding.U) + rounding.TINY
        farthest = farthest.nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(0.0)
        return Distance.of(torch.minimum(self.each, farthest), self.total)


def distance_of(
    step: Step,
    sources: list[Distance],
    weights: Weights,
    region: Around | None,
    norms: Callable[[LinearMap], float],
) -> Distance:
    """The distances of a step's result from those of what it reads; no region for inputs that stay at the centre."""
    if isinstance(step, Input):
        if region is None:
            return Distance(torch.zeros(step.size, dtype=torch.float64), 0.0)
        return Distance(region.spread, region.radius)
    total = sources[0].total if len(sources) == 1 else math.hypot(*(s.total for s in sources)) * (1 + 1e-12)
    if isinstance(step, Linear):
        each = _moved(step.map, sources[0].each, weights)
        return Distance.of(each, rounding.mul_up(norms(step.map), total))
    if isinstance(step, Sum):
        parts = [_times(abs(c), s.each) for c, s in zip(step.coefficients, sources, strict=True)]
        reached = (rounding.mul_up(abs(c), s.total) for c, s in zip(step.coefficients, sources, strict=True))
        return Distance.of(torch.stack(parts).sum(0) * (1 + 1e-12), rounding.add_up(*reached))
    if isinstance(step, Concat):
        return Distance.of(torch.cat([s.each for s in sources])[concat_order(step.shapes, step.axis)], total)
    if isinstance(step, Elementwise):
        steep = steepness(step)
        return Distance.of(_times(steep, sources[0].each), rounding.mul_up(float(steep.max()), total))
    assert isinstance(step, Opaque)
    top = rounding.mul_up(step.constant, total)
    if step.kind == "normalize":
        return _normalised(step, sources[0], top)
    return Distance.of(torch.full((step.size,), top, dtype=torch.float64), top)


def _normalised(step: Opaque, source: Distance, top: float) -> Distance:
    """Each group moves by itself, and no result is longer than its normalisation lets it be."""
    norm = Normalisation.of(step.parameters)
    groups = norm.grouped(source.each)
    scale = groups.amax(1).clamp_min(rounding.TINY)
    moved = (groups / scale[:, None]).norm(dim=1) * scale * (step.constant * (1 + 1e-9))
    each = moved.nan_to_num(nan=math.inf).clamp(max=2 * norm.longest)
    return Distance.of(norm.spread(each, step.size), min(top, 2 * norm.longest * math.sqrt(len(each)) * (1 + 1e-9)))


def steepness(step: Elementwise) -> Tensor:
    """The largest size of the slope of each element."""
    return torch.maximum(per_element(step.low, step.shape).abs(), per_element(step.high, step.shape).abs())


def _times(factor: float | Tensor, each: Tensor) -> Tensor:
    """A product that is 0 where a factor is, even if the other one is infinite, and positive elsewhere."""
    moves = (each > 0) & (torch.as_tensor(factor) > 0)
    return torch.where(moves, factor * each * (1 + 1e-12) + rounding.TINY, 0.0)


def _moved(linear: LinearMap, each: Tensor, weights: Weights) -> Tensor:
    """`|A|` times the distances."""
    moves = _reached(linear, each > 0, weights)
    if not bool(torch.isfinite(each).all()):
        return torch.where(moves, math.inf, 0.0).double()
    count = linear.terms(weights)
    moved = linear.apply(each.reshape(1, *linear.in_shape), weights, absolute=True).reshape(-1).double()
    return torch.where(moves, moved * (1 + rounding.gamma(count + linear.units + 8)) + count * rounding.TINY, 0.0)


def _reached(linear: LinearMap, moves: Tensor, weights: Weights) -> Tensor:
    """Which results read an element that moves."""
    if isinstance(linear, Scale) and linear.units:
        return moves  # a factor that is computed may have underflowed
    if linear.units:
        return moves.any().expand(math.prod(linear.out_shape))
    if bool(moves.all()) and not isinstance(linear, Scale | Gather):
        return moves.new_ones(math.prod(linear.out_shape))  # but for rows of zeros, which are not worth a pass
    ones = moves.double().reshape(1, *linear.in_shape)
    reached: Tensor = linear.apply(ones, weights, absolute=True).reshape(-1) > 0
    return reached
