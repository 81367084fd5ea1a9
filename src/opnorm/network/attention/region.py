"""Attention on a region: three constants, for what moves the queries, the keys and the values.

With P the probabilities, `d out_i = sum_j p_ij dv_j + s Cov_i(v, k) dq_i + s M_i (dK q_i)`, where `M_i` has the columns
`p_ij (v_j - mean_i v)`. The proofs are in the guide.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.program import Opaque, Step, Sum
from opnorm.network.attention.scores import Scores
from opnorm.network.centre import relative
from opnorm.network.distance import Distance
from opnorm.network.read import Read
from opnorm.network.region import norm_up
from opnorm.network.spectral import spectral_up

_SLACK = 1 + 1e-9
_FEW = 1 << 23
"""Numbers that are held at once."""
_TINY = 1e-290
_LOST = 1e-290
"""A probability below it counts as that: what `exp` loses to underflow."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Queries, keys or values: at the centre, and how far each one, and those of each head, can be from there.

    Attributes:
        at: at the centre, shape (heads, tokens, width).
        off: how far each can be from there, shape (heads, tokens).
        together: the same for all tokens of a head, shape (heads,).
        norm: the largest norm of each in the region, shape (heads, tokens).
        low: the smallest elements.
        high: the largest.
    """

    at: Tensor
    off: Tensor
    together: Tensor
    norm: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(read: Read, heads: int, width: int) -> "Tokens":
        """From what is known of an argument."""
        at, off, low, high = (x.reshape(heads, -1, width) for x in (read.value, read.off, read.low, read.high))
        each = (off.norm(dim=-1) * _SLACK + 1e-150).clamp(max=read.off_together)
        largest = torch.maximum(low.abs(), high.abs()).norm(dim=-1)
        norm = torch.minimum(at.norm(dim=-1) + each, largest) * _SLACK + 1e-150
        together = (each.norm(dim=-1) * _SLACK + 1e-150).clamp(max=read.off_together)
        return Tokens(at, each, together, norm, low, high)

    def deviation(self, likely: Tensor, *, centred: bool) -> Tensor:
        """Of each query: the largest standard deviation of these tokens along any direction, shape (heads, queries).

        Args:
            likely: upper bounds of the probabilities, shape (heads, queries, tokens).
            centred: about any point that serves; otherwise about 0.
        """
        middle = self.at - self.at.mean(1, keepdim=True) if centred else self.at
        size = middle.norm(dim=-1) * _SLACK
        widest = torch.minimum((size + self.off).amax(1), self.norm.amax(1)) * _SLACK + 1e-150
        moved = torch.minimum(
            (likely @ self.off.square()[..., None])[..., 0].sqrt(), likely.amax(-1).sqrt() * self.together[:, None]
        )
        moved = torch.minimum(moved, self.off.amax(1, keepdim=True))
        spread = (likely @ size.square()[..., None])[..., 0].sqrt()
        heads, queries, width = len(middle), likely.shape[1], middle.shape[-1]
        if queries * width * width <= _FEW:
            for head in range(heads):
                outer = middle[head, :, :, None] * middle[head, :, None, :]
                moments = (likely[head] @ outer.flatten(1)).reshape(queries, width, width)
                spread[head] = torch.minimum(spread[head], spectral_up(moments).sqrt())
        return torch.minimum((spread + moved) * _SLACK + 1e-150, widest[:, None])


def attention_on_region(
    step: Opaque, reads: list[Read], scores: Scores, *, start: int
) -> tuple[list[Step], None, Tensor, Distance]:
    """Three functions of one source each and their sum; how far each result can be from its centre, and the rounding.

    Args:
        step: with the positions of its sources among the new steps.
        reads: queries, keys, values.
        scores: what is done to the products.
        start: the position of the first new step.
    """
    heads, _, width = step.shape
    inner = reads[0].value.numel() // scores.scale.numel()
    q, k, v = (Tokens.of(r, heads, w) for r, w in zip(reads, (inner, inner, width), strict=True))
    scale = scores.scale.abs() * (1 + 1e-12)
    centred = scores.kept is None
    likely, rounded = _likely(q, k, scores)
    of_values, of_keys = v.deviation(likely, centred=True), k.deviation(likely, centred=centred)
    most = likely.amax(-1)
    through = of_values * torch.minimum(most.sqrt(), torch.tensor(0.5**0.5)) * _SLACK
    by_query = scale * of_values * of_keys * _SLACK
    by_keys = scale * through
    weighed = spectral_up(by_keys[..., None] * q.at) + by_keys.amax(1) * q.together
    weighed = torch.minimum(weighed, (by_keys * q.norm).norm(dim=-1)) * _SLACK
    columns = likely.sum(1).amax(-1).clamp(max=likely.shape[1]).sqrt()
    averaged = torch.minimum(columns, spectral_up(likely)) * _SLACK
    constants = [_finite(float(c.max())) for c in (by_query, weighed, averaged)]
    names = ("queries", "keys", "values")
    reason = "attention on the region"
    steps: list[Step] = [
        Opaque((source,), step.shape, f"{step.label} ({name})", constant, f"{reason}: what moves its {name}")
        for source, name, constant in zip(step.sources, names, constants, strict=True)
    ]
    steps.append(Sum((start, start + 1, start + 2), step.shape, step.label, (1.0, 1.0, 1.0)))
    by_values = torch.minimum((likely @ v.off[..., None])[..., 0], v.off.amax(1, keepdim=True))
    by_values = torch.minimum(by_values, most.sqrt() * v.together[:, None])
    turned = torch.minimum(by_keys * k.together[:, None], scale * of_values * k.off.amax(1, keepdim=True))
    each = (by_query * q.off + turned * q.norm + by_values) * (1 + 1e-8)
    moves = any(bool((r.distance.each > 0).any()) for r in reads)
    each = each + _TINY if moves else torch.zeros_like(each)
    lost = (rounded * of_values + relative(likely.shape[-1]) * v.norm.amax(1, keepdim=True)) * (1 + 1e-8) + _TINY
    return (
        steps,
        None,
        _rows(each, width),
        Distance.of(_rows(lost, width), math.sqrt(width) * norm_up(lost.reshape(-1))),
    )


def _rows(each: Tensor, width: int) -> Tensor:
    return each[..., None].expand(*each.shape, width).reshape(-1).nan_to_num(nan=math.inf)


def _likely(q: Tokens, k: Tokens, scores: Scores) -> tuple[Tensor, Tensor]:
    """Upper bounds of the probabilities in the region, and how far scores can be off by rounding, for each query."""
    middle = k.at - k.at.mean(1, keepdim=True) if scores.kept is None else k.at
    size = middle.norm(dim=-1)[:, None] * _SLACK
    moved = q.at.norm(dim=-1)[..., None] * _SLACK * k.off[:, None] + (size + k.off[:, None]) * q.off[..., None]
    moved = (moved.amax(-1) * scores.scale.abs() * (1 + 1e-8)).nan_to_num(nan=math.inf)
    values = scores.of(q.at, k.at)
    near = values > values.amax(-1, keepdim=True) - 1e4
    products = (q.at.norm(dim=-1)[..., None] * k.at.norm(dim=-1)[:, None]).amax(-1) * scores.scale.abs()
    rounded = 2 * relative(q.at.shape[-1]) * (products + torch.where(near, values.abs(), 0.0).amax(-1) + 1)
    weights = scores.weights(q.at, k.at).clamp(min=_LOST, max=1.0)
    less = (-2 * (moved + rounded)).exp() * (1 - 1e-9)
    likely = 1 / (1 + (1 - weights).clamp_min(0.0) * (1 - 1e-12) / weights * less[..., None]) * _SLACK
    likely = torch.where(scores.bias == -math.inf, 0.0, likely.nan_to_num(nan=1.0).clamp(max=1.0))
    return likely, rounded.nan_to_num(nan=math.inf)


def _finite(value: float) -> float:
    return rounding.up(value) if math.isfinite(value) else math.inf
