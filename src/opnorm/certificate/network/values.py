"""What each step's result can be on a region: its value at the centre, and between which numbers its elements lie.

All ends are rounded outward. What is not known is infinite, and stays so: it never tightens anything.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.images import image_of
from opnorm.certificate.network.maps import LinearMap, Scale, Weighted, Weights, stored
from opnorm.certificate.network.program import Concat, Elementwise, Linear, Opaque, Shift, Step, Sum
from opnorm.certificate.network.region import Around, norm_up
from opnorm.certificate.network.stages import concat_order, per_element

_SPARE = 1 + 8 * rounding.U


@dataclass(frozen=True, eq=False)
class Values:
    """Of one tensor, flattened, over a region.

    Attributes:
        at: the value at the centre, as computed.
        doubt: how far it is from the exact one.
        low: the smallest exact value in the region.
        high: the largest.
        total: how far the whole tensor can be from its exact value at the centre, in the Euclidean norm.
    """

    at: Tensor
    doubt: Tensor
    low: Tensor
    high: Tensor
    total: float

    @staticmethod
    def settled(at: Tensor, doubt: Tensor, low: Tensor, high: Tensor, total: float) -> "Values":
        """All of them, each as narrow as the others make it; NaN counts as unknown."""
        total = math.inf if math.isnan(total) else total
        low = low.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        high = high.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        unknown = ~(torch.isfinite(at) & torch.isfinite(doubt))
        between = torch.isfinite(low) & torch.isfinite(high)
        middle, half = middle_and_half(low, high)
        at = torch.where(unknown, torch.where(between, middle, 0.0), at)
        doubt = torch.where(unknown, torch.where(between, half, math.inf), doubt)
        return Values(at, doubt, low, high, total).within(total)

    @staticmethod
    def unknown(size: int, total: float) -> "Values":
        """Nothing but how far it moves."""
        ends = torch.full((size,), math.inf, dtype=torch.float64)
        return Values(torch.zeros_like(ends), ends, -ends, ends, math.inf if math.isnan(total) else total)

    def within(self, reach: float | Tensor) -> "Values":
        """The same where each element is at most so far from its exact value at the centre."""
        width = (self.doubt + reach) * _SPARE + rounding.TINY
        low, high = torch.maximum(self.low, below(self.at - width)), torch.minimum(self.high, above(self.at + width))
        far = torch.maximum(high - self.at, self.at - low) * _SPARE + self.doubt * _SPARE + rounding.TINY
        return Values(self.at, self.doubt, low, high, min(self.total, norm_up(far)))

    @property
    def known(self) -> bool:
        """Whether all of it is finite."""
        return bool(torch.isfinite(torch.stack([self.at, self.doubt, self.low, self.high])).all())

    @property
    def off(self) -> Tensor:
        """How far an exact value in the region is from the computed one at the centre, at most."""
        return torch.maximum(self.high - self.at, self.at - self.low) * _SPARE + self.doubt * _SPARE + rounding.TINY


def above(x: Tensor) -> Tensor:
    """More than the exact result of the one rounded operation that gave x."""
    return x + x.abs() * (4 * rounding.U) + rounding.TINY


def below(x: Tensor) -> Tensor:
    """Less than it."""
    return x - x.abs() * (4 * rounding.U) - rounding.TINY


def middle_and_half(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A number in the middle of each interval, and how far its ends are from there."""
    middle = low / 2 + high / 2
    return middle, above(torch.maximum(high - middle, middle - low))


def input_values(region: Around) -> Values:
    """Of the input itself."""
    exact = torch.zeros_like(region.center)
    low, high = below(region.center - region.spread), above(region.center + region.spread)
    return Values(region.center, exact, low, high, region.radius)


def affine_values(step: Step, sources: list[Values], weights: Weights, norm: float) -> Values:
    """Of an affine step.

    Args:
        step: a map, a sum, a concatenation or a shift.
        sources: what it reads.
        weights: by name, the program's constants among them.
        norm: of the map, if it is one; infinite where that is not known.
    """
    if isinstance(step, Linear):
        return _mapped(step.map, sources[0], weights, norm)
    if isinstance(step, Shift):
        return _shifted(step, sources[0], weights)
    if isinstance(step, Sum):
        return _summed(step, sources)
    assert isinstance(step, Concat)
    order = concat_order(step.shapes, step.axis)
    at, doubt, low, high = (
        torch.cat([getattr(s, name) for s in sources])[order] for name in ("at", "doubt", "low", "high")
    )
    return Values.settled(at, doubt, low, high, joined(sources))


def joined(sources: list[Values]) -> float:
    """How far several tensors together can move."""
    return sources[0].total if len(sources) == 1 else math.hypot(*(s.total for s in sources)) * (1 + 1e-12)


def _mapped(linear: LinearMap, x: Values, weights: Weights, norm: float) -> Values:
    rows = _row_norms(linear, weights)
    whole = norm_up(rows) if rows is not None else math.inf
    total = rounding.mul_up(min(norm, whole), x.total)
    if not x.known:
        return Values.unknown(math.prod(linear.out_shape), total)
    middle, half = middle_and_half(x.low, x.high)
    count = linear.terms(weights) + linear.units
    points, widths = torch.stack([x.at, middle]), torch.stack([x.doubt, half])
    widths = widths + rounding.gamma(count + 2) * points.abs() + rounding.TINY
    value = linear.apply(points.reshape(2, *linear.in_shape), weights).reshape(2, -1)
    width = linear.apply(widths.reshape(2, *linear.in_shape), weights, absolute=True).reshape(2, -1)
    width = width * (1 + rounding.gamma(2 * count + 8)) + 4 * (count + 2) * rounding.TINY
    found = Values.settled(value[0], width[0], below(value[1] - width[1]), above(value[1] + width[1]), total)
    return found if rows is None or math.isinf(x.total) else found.within(rows * x.total * _SPARE + rounding.TINY)


def _row_norms(linear: LinearMap, weights: Weights) -> Tensor | None:
    """Upper bounds of the norms of a map's rows, where every coefficient is one entry of its tensor."""
    if not isinstance(linear, Weighted) or isinstance(linear, Scale) or linear.units > linear.rounded:
        return None
    squares = {**weights, linear.weight: stored(weights, linear.weight).square()}
    ones = torch.ones(1, *linear.in_shape, dtype=torch.float64)
    count = linear.terms(weights)
    sums = linear.apply(ones, squares).reshape(-1) * (1 + rounding.gamma(count + 2 * linear.units + 8))
    return (sums + (count + 1) * rounding.TINY).sqrt() * _SPARE


def _shifted(step: Shift, x: Values, weights: Weights) -> Values:
    if not step.weight:
        return Values.unknown(step.size, x.total)
    flat = stored(weights, step.weight).reshape(1, -1, 1).expand(step.before, -1, step.after).reshape(-1)
    shift = step.coefficient * flat
    lost = shift.abs() * (2 * rounding.U) + rounding.TINY
    doubt = (x.doubt + lost + (x.at + shift).abs() * (2 * rounding.U)) * _SPARE + rounding.TINY
    low, high = below(below(x.low + shift) - lost), above(above(x.high + shift) + lost)
    return Values.settled(x.at + shift, doubt, low, high, x.total)


def _summed(step: Sum, sources: list[Values]) -> Values:
    terms = list(zip(step.coefficients, sources, strict=True))
    total = rounding.add_up(*(rounding.mul_up(abs(c), s.total) for c, s in terms))
    if not all(s.known for s in sources):
        return Values.unknown(step.size, total)
    relative = 1 + rounding.gamma(2 * len(terms) + 8)
    ends = [torch.stack([c * s.low, c * s.high]) for c, s in terms]
    size = sum((e.abs().amax(0) for e in ends), torch.zeros(step.size, dtype=torch.float64))
    lost = (size * rounding.gamma(len(terms) + 4) + 4 * len(terms) * rounding.TINY) * relative
    at = sum((c * s.at for c, s in terms), torch.zeros(step.size, dtype=torch.float64))
    # Each value at the centre is within its doubt of the region's, so that `lost` covers its rounding as well.
    carried = sum((abs(c) * s.doubt for c, s in terms), torch.zeros(step.size, dtype=torch.float64))
    doubt = carried * relative * (1 + rounding.gamma(len(terms) + 4)) + lost
    low = sum((e.amin(0) for e in ends), torch.zeros(step.size, dtype=torch.float64))
    high = sum((e.amax(0) for e in ends), torch.zeros(step.size, dtype=torch.float64))
    return Values.settled(at, doubt, below(low - lost), above(high + lost), total)


def elementwise_values(step: Elementwise, slopes: tuple[Tensor, Tensor], x: Values, weights: Weights) -> Values:
    """Of a function of each element, with the slopes that it has on the region."""
    steep = float(torch.maximum(slopes[0].abs(), slopes[1].abs()).max())
    total = rounding.mul_up(steep, x.total)
    image = image_of(step, weights)
    if image is None:
        return Values.unknown(step.size, total)
    everywhere = torch.maximum(per_element(step.low, step.shape).abs(), per_element(step.high, step.shape).abs())
    at, rough = image.at(x.at)
    doubt = (everywhere * x.doubt + rough) * _SPARE + rounding.TINY
    return Values.settled(at, doubt, *image.of(x.low, x.high), total)


def product_values(x: Values, g: Values) -> Values:
    """Of a product, element by element."""
    corners = torch.stack([a * b for a in (x.low, x.high) for b in (g.low, g.high)])
    low, high = below(corners.amin(0)), above(corners.amax(0))
    at = x.at * g.at
    doubt = x.at.abs() * g.doubt + g.at.abs() * x.doubt + x.doubt * g.doubt + at.abs() * (2 * rounding.U)
    sizes = (rounding.up(float(torch.maximum(f.low.abs(), f.high.abs()).max())) for f in (g, x))
    total = rounding.add_up(*(rounding.mul_up(s, f.total) for s, f in zip(sizes, (x, g), strict=True)))
    return Values.settled(at, doubt * (1 + rounding.gamma(16)) + 4 * rounding.TINY, low, high, total)


def normalised_values(step: Opaque, x: Values) -> tuple[float, Values]:
    """A constant of `x -> (x - mean) / sqrt(var + eps)` on the region, and its values.

    The standard deviation is at least that at the centre less `|x - x(c)| / sqrt(n)`.
    """
    size, eps, centred = int(step.parameters[0]), step.parameters[1], step.parameters[2] > 0
    top = math.sqrt(size) * (1 + 1e-9)
    ends = torch.full((step.size,), top, dtype=torch.float64)
    if not x.known:
        return step.constant, Values.settled(ends * 0, ends, -ends, ends, rounding.mul_up(step.constant, x.total))
    groups = x.at.reshape(-1, size)
    middle = groups - groups.mean(1, keepdim=True) if centred else groups
    lost = rounding.gamma(size + 16) * 4 * groups.abs().amax(1) + rounding.TINY
    doubt = x.doubt.reshape(-1, size).norm(dim=1) * (1 + 1e-9) + rounding.TINY
    moved = (x.off.reshape(-1, size).norm(dim=1) * (1 + 1e-9)).clamp(max=above(x.total + doubt))
    deviation = middle.norm(dim=1) / math.sqrt(size)
    # Of every input in the region, and of every point on the way from the computed centre to the exact one.
    least = (deviation * (1 - 1e-9) - (moved + doubt) / math.sqrt(size) * (1 + 1e-9) - 2 * lost).clamp_min(0)
    under = ((least - 1e-150).clamp_min(0).square() + eps) * (1 - 1e-9)
    steep = torch.where(under > 0, (1 + 1e-12) / under.sqrt(), math.inf).clamp(max=step.constant)
    constant = float(steep.max())
    result = middle / (middle.square().mean(1, keepdim=True) + eps).sqrt()
    error = steep * (doubt + math.sqrt(size) * lost) * (1 + 1e-9) + rounding.gamma(size + 16) * top
    total = rounding.mul_up(constant, x.total)
    return constant, Values.settled(result.reshape(-1), error.repeat_interleave(size), -ends, ends, total)
