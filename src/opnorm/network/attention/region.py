"""Attention on a region: three constants, for what moves the queries, the keys and the values.

With P the probabilities, `d out_i = sum_j p_ij dv_j + s Cov_i(v, k) dq_i + s M_i (dK q_i)`, where `M_i` has the columns
`p_ij (v_j - mean_i v)`. The proofs are in the guide.
"""

import math

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.program import Opaque, Step, Sum
from opnorm.certificate.network.region import norm_up
from opnorm.network.attention.moments import at_centre, changed
from opnorm.network.attention.scores import Scores
from opnorm.network.attention.tokens import SLACK, Tokens
from opnorm.network.centre import relative
from opnorm.network.distance import Distance
from opnorm.network.read import Read
from opnorm.network.spectral import spectral_up

_TINY = 1e-290
_LOST = 1e-290
"""What is added where something moves; a probability below counts as that: what `exp` loses to underflow."""


def attention_on_region(
    step: Opaque, reads: list[Read], scores: Scores, *, start: int
) -> tuple[list[Step], Tensor, Distance]:
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
    weights = scores.weights(q.at, k.at).clamp(min=0.0, max=1.0)
    moved, rounded = _moved(q, k, scores)
    likely = _likely(weights, moved + rounded, scores)
    of_values, of_keys = v.deviation(likely, centred=True), k.deviation(likely, centred=scores.kept is None)
    most = likely.amax(-1)
    root = torch.minimum(most.sqrt(), torch.tensor(0.5**0.5)) * SLACK
    drift = torch.expm1(2 * (moved + rounded)) * SLACK + 1e-12
    at = at_centre(weights, k, v, scores)
    crossed, masses = changed(at, drift, of_keys, of_values, k=k, v=v, root=most.sqrt() * SLACK)
    by_query = scale * _smaller(crossed, of_values * of_keys) * SLACK
    by_keys = scale * _smaller(masses, of_values * root) * SLACK
    weighed = spectral_up(by_keys[..., None] * q.at) + by_keys.amax(1) * q.together
    weighed = torch.minimum(weighed, (by_keys * q.norm).norm(dim=-1)) * SLACK
    columns = likely.sum(1).amax(-1).clamp(max=likely.shape[1]).sqrt()
    averaged = torch.minimum(columns, spectral_up(likely)) * SLACK
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
        _rows(each, width),
        Distance.of(_rows(lost, width), math.sqrt(width) * norm_up(lost.reshape(-1))),
    )


def _rows(each: Tensor, width: int) -> Tensor:
    return each[..., None].expand(*each.shape, width).reshape(-1).nan_to_num(nan=math.inf)


def _moved(q: Tokens, k: Tokens, scores: Scores) -> tuple[Tensor, Tensor]:
    """How far the scores of each query can move in the region, and how far they can be off by rounding."""
    middle = k.at - k.at.mean(1, keepdim=True) if scores.kept is None else k.at
    size = middle.norm(dim=-1)[:, None] * SLACK
    moved = q.at.norm(dim=-1)[..., None] * SLACK * k.off[:, None] + (size + k.off[:, None]) * q.off[..., None]
    values = scores.of(q.at, k.at)
    near = values > values.amax(-1, keepdim=True) - 1e4
    products = (q.at.norm(dim=-1)[..., None] * k.at.norm(dim=-1)[:, None]).amax(-1) * scores.scale.abs()
    rounded = 2 * relative(q.at.shape[-1]) * (products + torch.where(near, values.abs(), 0.0).amax(-1) + 1)
    moved = moved.amax(-1) * scores.scale.abs() * (1 + 1e-8)
    return moved.nan_to_num(nan=math.inf), rounded.nan_to_num(nan=math.inf)


def _likely(weights: Tensor, moved: Tensor, scores: Scores) -> Tensor:
    """Upper bounds of the probabilities where no score moves farther: `p / (p + (1 - p) exp(-2 moved))`."""
    least = weights.clamp(min=_LOST)
    rest = (1 - least).clamp_min(0.0) * (1 - 1e-12) / least * ((-2 * moved).exp() * (1 - 1e-9))[..., None]
    likely = (SLACK / (1 + rest)).nan_to_num(nan=1.0).clamp(max=1.0)
    return torch.where(scores.bias == -math.inf, 0.0, likely)


def _smaller(one: Tensor, two: Tensor) -> Tensor:
    """The smaller of two bounds, the second one where the first is not finite."""
    return torch.where(one < two, one, two)


def _finite(value: float) -> float:
    return rounding.up(value) if math.isfinite(value) else math.inf
