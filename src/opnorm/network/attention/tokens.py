"""What is known of queries, keys and values in a region."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.network.read import Read
from opnorm.network.spectral import spectral_up

SLACK = 1 + 1e-9
FEW = 1 << 23
"""Numbers that are held at once."""


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
        each = (off.norm(dim=-1) * SLACK + 1e-150).clamp(max=read.off_together)
        largest = torch.maximum(low.abs(), high.abs()).norm(dim=-1)
        norm = torch.minimum(at.norm(dim=-1) + each, largest) * SLACK + 1e-150
        together = (each.norm(dim=-1) * SLACK + 1e-150).clamp(max=read.off_together)
        return Tokens(at, each, together, norm, low, high)

    def deviation(self, likely: Tensor, *, centred: bool) -> Tensor:
        """Of each query: the largest standard deviation of these tokens along any direction, shape (heads, queries).

        Args:
            likely: upper bounds of the probabilities, shape (heads, queries, tokens).
            centred: about any point that serves; otherwise about 0.
        """
        middle = self.at - self.at.mean(1, keepdim=True) if centred else self.at
        size = middle.norm(dim=-1) * SLACK
        widest = torch.minimum((size + self.off).amax(1), self.norm.amax(1)) * SLACK + 1e-150
        moved = torch.minimum(
            (likely @ self.off.square()[..., None])[..., 0].sqrt(), likely.amax(-1).sqrt() * self.together[:, None]
        )
        moved = torch.minimum(moved, self.off.amax(1, keepdim=True))
        spread = (likely @ size.square()[..., None])[..., 0].sqrt()
        heads, queries, width = len(middle), likely.shape[1], middle.shape[-1]
        if queries * width * width <= FEW:
            for head in range(heads):
                outer = middle[head, :, :, None] * middle[head, :, None, :]
                moments = (likely[head] @ outer.flatten(1)).reshape(queries, width, width)
                spread[head] = torch.minimum(spread[head], spectral_up(moments).sqrt())
        return torch.minimum((spread + moved) * SLACK + 1e-150, widest[:, None])
