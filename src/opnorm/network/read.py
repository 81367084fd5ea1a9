"""What is known of an argument of an operation in a region."""

import math
from dataclasses import dataclass

from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.network.centre import EVALUATION
from opnorm.network.distance import Distance
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
    doubt: Distance
    low: Tensor
    high: Tensor

    @staticmethod
    def of(value: Tensor, distance: Distance, doubt: Distance, everywhere: Range) -> "Read":
        """With the ends that follow, and those that hold for all inputs."""
        doubt += Distance.of(EVALUATION * value.abs(), math.inf)
        width = (distance.each + doubt.each) * (1 + 1e-12) + 1e-300
        low = (value - width).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp_min(everywhere[0])
        high = (value + width).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).clamp_max(everywhere[1])
        return Read(value, distance, doubt, low, high)

    @property
    def off(self) -> Tensor:
        """How far an exact value in the region is from the computed one at the centre, at most."""
        return self.distance.each + self.doubt.each

    @property
    def off_together(self) -> float:
        """The same for all elements together."""
        return rounding.add_up(self.distance.total, self.doubt.total)
