"""One operation on a region: its slopes or its constant there, from what is known of the tensors that it reads."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import slopes_between
from opnorm.certificate.network.program import Elementwise, Opaque, Step, Sum
from opnorm.certificate.network.region import norm_up
from opnorm.certificate.network.stages import per_element
from opnorm.network.attention.region import attention_on_region
from opnorm.network.attention.scores import Scores
from opnorm.network.centre import EVALUATION, relative
from opnorm.network.distance import Distance
from opnorm.network.matrices import product_on_region
from opnorm.network.normalisation import Normalisation
from opnorm.network.read import Read
from opnorm.network.rules.ranges import Range


@dataclass(frozen=True, eq=False)
class Local:
    """What a step amounts to on a region.

    Attributes:
        steps: in order; the last one has the result.
        each: how far the elements of the result can be from their centre, where the rule knows; None elsewhere.
        rounding: of the operation at the centre, likewise.
    """

    steps: list[Step]
    each: Tensor | None = None
    rounding: Distance | None = None


def on_region(step: Step, reads: list[Read], scores: Scores | None, *, start: int) -> Local:
    """The steps that a step amounts to on a region; itself where nothing is known.

    Args:
        step: with the positions of its sources among the new steps.
        reads: its arguments, or none.
        scores: of an attention.
        start: the position of the first new step.
    """
    if isinstance(step, Elementwise) and step.kind and len(reads) == 1 and reads[0].value.numel() == step.size:
        return Local([_sloped(step, reads[0])])
    if not isinstance(step, Opaque) or not reads:
        return Local([step])
    if step.kind == "attention" and scores is not None and len(reads) == 3:
        return Local(*attention_on_region(step, reads, scores, start=start))
    if step.kind == "matrices" and len(reads) == 2:
        return Local(*product_on_region(step, reads, start=start))
    if step.kind == "multiply" and len(reads) == 2:
        return Local(_product(step, reads[0], reads[1], start=start))
    if step.kind == "normalize" and len(reads) == 1:
        return _normalized(step, reads[0], start=start)
    return Local([_tightened(step, reads)])


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
    if step.kind in ("square", "exp") and len(reads) == 1 and reads[0].value.numel() == step.size:
        low, high = reads[0].low, reads[0].high
        if step.kind == "exp":
            low, high = low.exp() * (1 - 1e-9), high.exp() * (1 + 1e-9) + rounding.TINY
        else:
            low, high = 2 * low, 2 * high
        if bool(torch.isfinite(high).all() and torch.isfinite(low).all()):
            label, shape = f"{step.label} on the region", step.shape
            return Elementwise(step.sources, shape, label, low.reshape(shape), high.reshape(shape))
    return step


def _normalized(step: Opaque, read: Read, *, start: int) -> Local:
    """Each group times a constant of its own, and then a function of constant 1."""
    norm = Normalisation.of(step.parameters)
    constants = norm.constants(_shortest(norm, read)).nan_to_num(nan=math.inf).clamp(max=step.constant)
    reason = "normalising, with the variance of the region"
    if not bool(constants.isfinite().all()):
        return Local([replace(step, constant=math.inf, reason=reason)])
    each = norm.spread(constants, step.size).reshape(step.shape)
    scale = Elementwise(step.sources, step.shape, f"{step.label} (over the deviation)", each, each)
    size = norm.grouped(read.value).norm(dim=1) * constants + 2 * norm.longest
    lost = 4 * relative(int(norm.size)) * size + rounding.TINY
    doubt = Distance.of(norm.spread(lost, step.size), norm_up(lost))
    return Local([scale, replace(step, sources=(start,), constant=1.0, reason=reason)], rounding=doubt)


def _shortest(norm: Normalisation, read: Read) -> Tensor:
    """A lower bound of the norm of each group in the region."""
    groups = norm.grouped(read.value)
    middle = groups - groups.mean(1, keepdim=True) if norm.centred else groups
    moved = (norm.grouped(read.off).norm(dim=1) * (1 + 1e-9) + 1e-150).clamp(max=read.off_together)
    lost = relative(int(norm.size)) * groups.abs().amax(1) * math.sqrt(norm.size) + 1e-140
    least: Tensor = middle.norm(dim=1) * (1 - 1e-9) - moved - lost
    return least.clamp_min(0.0)


def limits_of(step: Step, reads: list[Read], everywhere: Range, like: Tensor) -> tuple[Tensor, Tensor]:
    """Between which numbers the elements of a node's result lie in the region.

    Args:
        step: the node's, before it was changed for the region.
        reads: its arguments.
        everywhere: the ends that hold for all inputs.
        like: a tensor of the result's size.
    """
    ceiling = math.inf
    if isinstance(step, Opaque) and step.kind == "normalize":
        ceiling = Normalisation.of(step.parameters).longest
    low = torch.full_like(like, max(everywhere[0], -ceiling))
    high = torch.full_like(like, min(everywhere[1], ceiling))
    if isinstance(step, Opaque) and step.kind == "multiply" and len(reads) == 2:
        x, g = reads
        corners = torch.stack([a * b for a in (x.low, x.high) for b in (g.low, g.high)])
        if corners.shape[1] == like.numel() and bool(torch.isfinite(corners).all()):
            spare = corners.abs().amax(0) * (2 * rounding.U) + rounding.TINY
            low = torch.maximum(low, corners.amin(0) - spare)
            high = torch.minimum(high, corners.amax(0) + spare)
    if isinstance(step, Opaque) and step.kind == "attention" and len(reads) == 3:
        heads, queries, width = step.shape
        ends = [end.reshape(heads, -1, width) for end in (reads[2].low, reads[2].high)]
        average = (ends[0].amin(1, keepdim=True), ends[1].amax(1, keepdim=True))  # weighted averages of the values
        # Zeros where all keys are masked.
        bottom, top = (end.expand(-1, queries, -1).reshape(-1) for end in average)
        low = torch.maximum(low, bottom.clamp(max=0.0) * (1 + 1e-9))
        high = torch.minimum(high, top.clamp(min=0.0) * (1 + 1e-9))
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
