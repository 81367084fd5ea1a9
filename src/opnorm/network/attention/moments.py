"""Covariances of values and keys at the centre of a region, and how far the region can change them."""

import torch
from torch import Tensor

from opnorm.network.attention.scores import Scores
from opnorm.network.attention.tokens import FEW, SLACK, Tokens
from opnorm.network.centre import relative
from opnorm.network.spectral import spectral_up


def at_centre(weights: Tensor, k: Tokens, v: Tokens, scores: Scores) -> tuple[Tensor, Tensor]:
    """Upper bounds of `|Cov_i(v, k)|` and `|M_i|` there, of each query; infinite where they would not fit in memory."""
    heads, queries, count = weights.shape
    width = v.at.shape[-1]
    wide = width * max(width, k.at.shape[-1])
    crossed, masses = (torch.full((heads, queries), torch.inf, dtype=torch.float64) for _ in range(2))
    if max(queries, count) * wide > FEW:
        return crossed, masses
    centred = scores.kept is None
    for head in range(heads):
        values = v.at[head] - v.at[head].mean(0)
        keys = k.at[head] - k.at[head].mean(0) if centred else k.at[head]
        own = weights[head]
        kept = own if scores.kept is None else own * scores.kept[head]
        mean, spare = own @ values, relative(count + wide) * (values.norm(dim=1).amax() + 1e-150)
        cross = kept @ _outer(values, keys) - _outer(mean, kept @ keys)
        crossed[head] = spectral_up(cross.reshape(queries, width, -1)) + spare * (keys.norm(dim=1).amax() + 1e-150)
        squares = own.square()
        middle = _outer(squares @ values, mean).reshape(queries, width, width)
        least = _outer(mean, mean).reshape(queries, width, width) * squares.sum(1)[:, None, None]
        gram = (squares @ _outer(values, values)).reshape(queries, width, width) - middle - middle.mT + least
        masses[head] = (spectral_up(gram) + spare * (values.norm(dim=1).amax() + 1e-150)).sqrt()
    return crossed * SLACK, masses * SLACK


def changed(
    at: tuple[Tensor, Tensor], drift: Tensor, of_keys: Tensor, of_values: Tensor, *, k: Tokens, v: Tokens, root: Tensor
) -> tuple[Tensor, Tensor]:
    """The same anywhere in the region.

    Args:
        at: at the centre.
        drift: of each query: no probability changes by more than that share of its own.
        of_keys: the largest deviation of the keys, of each query.
        of_values: of the values.
        k: the keys.
        v: the values.
        root: an upper bound of the root of the sum of squared probabilities.
    """
    crossed, masses = at
    farthest_key, farthest_value = k.off.amax(1, keepdim=True), v.off.amax(1, keepdim=True)
    moved = (drift + drift.square()) * of_values * of_keys + farthest_value * of_keys + of_values * farthest_key
    shifted = masses * drift + root * (drift * of_values + farthest_value)
    return (crossed + moved) * SLACK, (masses + shifted) * SLACK


def _outer(first: Tensor, second: Tensor) -> Tensor:
    """The products of all pairs of elements in each row, flattened."""
    return (first[:, :, None] * second[:, None, :]).flatten(1)
