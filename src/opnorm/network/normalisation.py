"""Normalisations by the size of groups of elements: their constants where that size is bounded from below."""

import math
from dataclasses import astuple, dataclass

from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """`x / d(r)`, r the Euclidean norm of a group of elements; in a step's parameters as numbers.

    Attributes:
        size: of a group.
        eps: of the divisor.
        centred: whether the mean of the group is taken off first.
        form: 0 for `sqrt(r^2 / share + eps)`, 1 for `max(r, eps)`, 2 for `r / share + eps`.
        share: see there.
        after: how many elements of the sample lie between two of a group.
        operand: which argument of the operation is x.
    """

    size: float
    eps: float
    centred: float = 0.0
    form: float = 0.0
    share: float = 0.0
    after: float = 1.0
    operand: float = 0.0

    @staticmethod
    def of(parameters: tuple[float, ...]) -> "Normalisation":
        """From a step's parameters."""
        return Normalisation(*parameters)

    @property
    def parameters(self) -> tuple[float, ...]:
        """For a step."""
        return tuple(float(number) for number in astuple(self))

    @property
    def longest(self) -> float:
        """What the norm of a group does not exceed in the result."""
        return (1.0 if self.form == 1 else self.share if self.form == 2 else math.sqrt(self.share)) * (1 + 1e-9)

    def constants(self, least: Tensor) -> Tensor:
        """Of each group, from a lower bound of its norm: the proofs are in the guide to the rules."""
        if self.form == 0:
            constants: Tensor = (1 + 1e-9) / ((least / math.sqrt(self.share)).square() + self.eps).sqrt()
            return constants
        divisor = least.clamp_min(self.eps) if self.form == 1 else least / self.share + self.eps
        return (1 + 1e-9) / divisor

    def grouped(self, x: Tensor) -> Tensor:
        """The elements of a sample as (groups, size)."""
        return x.reshape(-1, int(self.size), int(self.after)).movedim(1, -1).reshape(-1, int(self.size))

    def spread(self, groups: Tensor, size: int) -> Tensor:
        """A number for each group as one for each of the sample's elements."""
        wide = groups.reshape(-1, 1, int(self.after)).expand(-1, int(self.size), -1)
        return wide.reshape(size)
