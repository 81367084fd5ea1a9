"""Attention in one layout: heads, tokens, width; whatever the model's own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.graph import Node


@dataclass(frozen=True, eq=False)
class Scores:
    """What goes into a softmax: `scale (q k^T) + bias`, or the bias alone where a score is not kept.

    Attributes:
        scale: of each query, shape (heads, queries).
        bias: a mask or a position bias, shape (heads, queries, keys); minus infinity takes a key out.
        kept: where scores are not replaced by constants, of the same shape; None where all are kept.
    """

    scale: Tensor
    bias: Tensor
    kept: Tensor | None

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """The scores of one or of several samples."""
        products = (query * self.scale[..., None].to(query)) @ key.mT
        if self.kept is not None:
            products = torch.where(self.kept, products, 0.0)
        return products + self.bias.to(query)

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Their softmax, and zeros where all keys are masked."""
        return self.of(query, key).softmax(-1).nan_to_num(0.0)


def attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """What a node `opnorm.attention` computes: (batch, heads, tokens, width) each."""
    return scores.weights(query, key) @ value


def rearranged(x: Tensor, before: Node, index: Tensor, after: Node | None) -> Tensor:
    """What a node `opnorm.rearranged` computes: elements of each sample of `before`, laid out as `after` if given."""
    samples = before.samples(x).reshape(-1, before.samples(x)[0].numel())[:, index.reshape(-1)]
    if after is None:
        return samples.reshape(-1, *index.shape)
    return after.batched(samples.reshape(-1, *after.sample_shape))
