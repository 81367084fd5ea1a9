"""What activations make of intervals: the smallest and the largest value, rounded outward, and how exact one value is.

A function that is not in the table has no image here: what reads its results has the slopes that hold everywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opnorm.certificate.network.maps import Weights, stored
from opnorm.certificate.network.program import Elementwise
from opnorm.certificate.network.stages import per_element

ROUGH = 1e-12
"""Error of a library's function, relative to 1 + |f|; checked in the tests against mpmath."""

_NEVER = (math.inf, -math.inf)


@dataclass(frozen=True, eq=False)
class Image:
    """A function that falls up to its turn, if it has one, and rises after it.

    Attributes:
        function: as it is computed.
        turn: between which numbers its lowest point lies.
        least: at most its value there.
        exact: whether it is computed without rounding.
    """

    function: Callable[[Tensor], Tensor]
    turn: tuple[float, float] = _NEVER
    least: float = math.inf
    exact: bool = False

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values at points, and how far they are from the exact ones."""
        value = self.function(x)
        return value, torch.zeros_like(value) if self.exact else ROUGH * (1 + value.abs())

    def of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the image of intervals; NaN where an infinite end has no value."""
        (first, one), (second, two) = self.at(low), self.at(high)
        turns = (low < self.turn[1]) & (high > self.turn[0])
        least = torch.minimum(first - one, second - two)
        return torch.where(turns, least.clamp(max=self.least), least), torch.maximum(first + one, second + two)


_IMAGES: dict[str, Image] = {
    "relu": Image(torch.relu, exact=True),
    "relu6": Image(F.relu6, exact=True),
    "abs": Image(torch.abs, (0.0, 0.0), 0.0, exact=True),
    "sigmoid": Image(torch.sigmoid),
    "tanh": Image(torch.tanh),
    "softsign": Image(F.softsign),
    "selu": Image(F.selu),
    "atan": Image(torch.atan),
    "erf": Image(torch.erf),
    "log_sigmoid": Image(F.logsigmoid),
    "tanhshrink": Image(F.tanhshrink),
    "hardsigmoid": Image(F.hardsigmoid),
    "hardswish": Image(F.hardswish, (-1.5, -1.5), -0.375000001),
    "gelu": Image(F.gelu, (-0.753, -0.751), -0.169972),
    "gelu_tanh": Image(lambda x: F.gelu(x, approximate="tanh"), (-0.754, -0.751), -0.170042),
    "silu": Image(F.silu, (-1.279, -1.278), -0.278465),
    "mish": Image(F.mish, (-1.193, -1.191), -0.308844),
}


def image_of(step: Elementwise, weights: Weights) -> Image | None:
    """What is known of the function of a step; None where that is nothing."""
    if step.kind == "leaky_relu":
        (alpha,) = step.parameters
        return _two_lines(torch.tensor(alpha, dtype=torch.float64))
    if step.kind == "prelu":
        left = stored(weights, step.weight).reshape(-1)
        return _two_lines(per_element(left if left.numel() > 1 else left[0], step.shape))
    if step.kind == "elu":
        alpha, scale, input_scale = step.parameters
        return Image(lambda x: torch.where(x > 0, scale * x, scale * alpha * torch.expm1(input_scale * x.clamp(max=0))))
    return _IMAGES.get(step.kind)


def _two_lines(left: Tensor) -> Image:
    """The slope 1 on the right; a negative slope on the left turns at 0, which is the value of no other turn."""
    return Image(lambda x: torch.where(x > 0, x, left * x), (0.0, 0.0), 0.0)
