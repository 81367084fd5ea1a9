"""One operation on a region: its slopes or its constant there, from what is known of the tensors that it reads."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import slopes_between
from opnorm.certificate.network.program import Elementwise, Opaque, Step, Sum
from opnorm.certificate.network.stages import per_element
from opnorm.network.centre import EVALUATION, relative
from opnorm.network.distance import Distance
from opnorm.network.region import norm_up
from opnorm.network.rules.ranges import Range


@dataclass(frozen=True, eq=False)
class Read:
    """An argument of an operation: what is known of it in the region.

    Attributes:
        value: at the centre, flattened, and enlarged as a product enlarges it.
        distance: from there.
        doubt: of the value.
        low: the smallest value in the region.
        high: the largest.
    """

    value: Tensor
    distance: Distance
    doubt: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(value: Tensor, distance: Distance, doubt: Tensor, everywhere: Range) -> "Read":
        """With the ends that follow, and those that hold for all inputs."""
        doubt = (doubt + EVALUATION * value.abs()).nan_to_num(nan=math.inf)
        width = (distance.each + doubt) * (1 + 1e-12) + 1e-300
        low = (value - width).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp_min(everywhere[0])
        high = (value + width).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).clamp_max(everywhere[1])
        return Read(value, distance, doubt, low, high)

    @property
    def off(self) -> Tensor:
        """How far an exact value in the region is from the computed one at the centre, at most."""
        return self.distance.each + self.doubt

    @property
    def off_together(self) -> float:
        """The same for all elements together."""
        return self.distance.total + norm_up(self.doubt)


def on_region(step: Step, reads: list[Read], *, start: int) -> list[Step]:
    """The steps that a step amounts to on a region; itself where nothing is known.

    Args:
        step: with the positions of its sources among the new steps.
        reads: its arguments, or none.
        start: the position of the first new step.
    """
    if isinstance(step, Elementwise) and step.kind and len(reads) == 1 and reads[0].value.numel() == step.size:
        return [_sloped(step, reads[0])]
    if isinstance(step, Opaque) and step.kind == "multiply" and len(reads) == 2:
        return _product(step, reads[0], reads[1], start=start)
    if isinstance(step, Opaque) and step.kind and reads:
        return [_tightened(step, reads)]
    return [step]


def _sloped(step: Elementwise, read: Read) -> Elementwise:
    """An activation with the slopes that it has between the ends; none where its argument does not move."""
    wide = (per_element(step.low, step.shape), per_element(step.high, step.shape))
    low, high = slopes_between(step.kind, read.low, read.high, wide)
    moves = read.distance.each > 0
    low, high = torch.where(moves, low, 0.0), torch.where(moves, high, 0.0)
    # The slopes are per element now, and hold on the region only: the kind no longer vouches for them.
    return replace(step, low=low.reshape(step.shape), high=high.reshape(step.shape), kind="")


def _product(step: Opaque, x: Read, g: Read, *, start: int) -> list[Step]:
    """`d(x g) = g dx + x dg` with g and x halfway between two points: two functions with bounded slopes, added."""
    ends = [end.reshape(step.shape) for end in (x.low, x.high, g.low, g.high) if end.numel() == step.size]
    if len(ends) < 4 or not all(bool(torch.isfinite(end).all()) for end in ends):
        return [step]
    x_low, x_high, g_low, g_high = ends
    first, second = step.sources
    return [
        Elementwise((first,), step.shape, f"{step.label} (first factor)", g_low, g_high),
        Elementwise((second,), step.shape, f"{step.label} (second factor)", x_low, x_high),
        Sum((start, start + 1), step.shape, step.label, (1.0, 1.0)),
    ]


def _tightened(step: Opaque, reads: list[Read]) -> Step:
    """A constant that holds on the region, where the operation is known."""
    if step.kind == "normalize" and len(reads) == 1:
        constant = min(step.constant, _normalising(step.parameters, reads[0]))
        return replace(step, constant=constant, reason="normalising, with the variance of the region")
    if step.kind in ("square", "exp") and len(reads) == 1 and reads[0].value.numel() == step.size:
        low, high = reads[0].low, reads[0].high
        if step.kind == "exp":
            low, high = low.exp() * (1 - 1e-9), high.exp() * (1 + 1e-9) + rounding.TINY
        else:
            low, high = 2 * low, 2 * high
        if bool(torch.isfinite(high).all() and torch.isfinite(low).all()):
            label, shape = f"{step.label} on the region", step.shape
            return Elementwise(step.sources, shape, label, low.reshape(shape), high.reshape(shape))
    if step.kind == "attention" and len(reads) == 3:
        return replace(step, constant=_attention(step.parameters, reads), reason="attention on the region")
    return step


def _normalising(parameters: tuple[float, ...], read: Read) -> float:
    """`1 / sqrt(var + eps)` with the standard deviation reduced by what the region can take from it."""
    size, eps, centred = int(parameters[0]), parameters[1], parameters[2] > 0
    groups = read.value.reshape(-1, size)
    middle = groups - groups.mean(1, keepdim=True) if centred else groups
    deviation = middle.norm(dim=1) / math.sqrt(size) * (1 - 1e-9)
    moved = (read.off.reshape(-1, size).norm(dim=1) * (1 + 1e-9)).clamp(max=read.off_together)
    least = (deviation - moved / math.sqrt(size) - relative(size) * groups.abs().amax(1) - 1e-150).clamp_min(0)
    under = float((least.square() + eps).min()) * (1 - 1e-9)
    return rounding.div_up(1.0, rounding.sqrt_down(under)) if under > 0 else math.inf


def _attention(parameters: tuple[float, ...], reads: list[Read]) -> float:
    """`sqrt(n + (s V K)^2 + n (s V Q)^2)` with the largest norms of a query, a key and a value in the region."""
    queries, _, width, value_width, scale = parameters
    largest = []
    for read, size in zip(reads, (width, width, value_width), strict=True):
        around = torch.maximum(read.low.abs(), read.high.abs()).reshape(-1, int(size)).norm(dim=1)
        at_most = read.value.reshape(-1, int(size)).norm(dim=1) + read.off_together
        largest.append(float(torch.minimum(around, at_most).max()) * (1 + 1e-9) + 1e-150)
    query, key, content = (s * size for s, size in zip((1.0, 1.0, scale * (1 + 1e-12)), largest, strict=True))
    by_keys, by_queries = content * key, content * query
    total = (queries + by_keys * by_keys + queries * by_queries * by_queries) * (1 + 1e-9)
    return rounding.sqrt_up(total) if math.isfinite(total) else math.inf


def ceiling_of(step: Step, reads: list[Read]) -> float:
    """What no element of a step's result exceeds in size, anywhere in the region; infinite where that is not known."""
    if not isinstance(step, Opaque):
        return math.inf
    if step.kind == "normalize":
        return math.sqrt(step.parameters[0]) * (1 + 1e-9)
    if step.kind == "attention" and len(reads) == 3:
        # Weighted averages of the values.
        return float(torch.maximum(reads[2].low.abs(), reads[2].high.abs()).max()) * (1 + 1e-9)
    return math.inf


def limits_of(step: Step, reads: list[Read], everywhere: Range, ceiling: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Between which numbers the elements of a node's result lie in the region.

    Args:
        step: the node's, before it was changed for the region.
        reads: its arguments.
        everywhere: the ends that hold for all inputs.
        ceiling: of the size of the elements.
        like: a tensor of the result's size.
    """
    low = torch.full_like(like, max(everywhere[0], -ceiling))
    high = torch.full_like(like, min(everywhere[1], ceiling))
    if isinstance(step, Opaque) and step.kind == "multiply" and len(reads) == 2:
        x, g = reads
        corners = torch.stack([a * b for a in (x.low, x.high) for b in (g.low, g.high)])
        if corners.shape[1] == like.numel() and bool(torch.isfinite(corners).all()):
            spare = corners.abs().amax(0) * (2 * rounding.U) + rounding.TINY
            low = torch.maximum(low, corners.amin(0) - spare)
            high = torch.minimum(high, corners.amax(0) + spare)
    if (
        isinstance(step, Elementwise)
        and step.kind in _RISING
        and len(reads) == 1
        and reads[0].value.numel() == len(like)
    ):
        image = _RISING[step.kind]
        low = torch.maximum(low, image(reads[0].low) - EVALUATION)
        high = torch.minimum(high, image(reads[0].high) + EVALUATION)
    return low, high


_RISING = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
