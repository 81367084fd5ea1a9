"""Regions of inputs on which a bound is to hold."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Ball:
    """All inputs within Euclidean distance `eps` of a sample.

    Attributes:
        center: one sample, without the batch.
        eps: the radius.
    """

    center: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Box:
    """All inputs between two samples, element by element.

    Attributes:
        lo: one sample, without the batch.
        hi: likewise, nowhere below `lo`.
    """

    lo: Tensor
    hi: Tensor


@dataclass(frozen=True)
class NormBall:
    """All inputs of at most a Euclidean norm.

    Attributes:
        radius: the largest norm.
    """

    radius: float


Region = Ball | Box | NormBall

_SHOWN = 4


@dataclass(frozen=True, eq=False)
class Around:
    """A region as a centre and how far its points are from it.

    Attributes:
        center: float64, flattened.
        radius: largest Euclidean distance.
        spread: largest distance of each element.
    """

    center: Tensor
    radius: float
    spread: Tensor

    def clip(self, x: Tensor) -> Tensor:
        """Project rows onto the region, a little inside its surface."""
        inside = (self.spread * (1 - 16 * rounding.U) - 16 * rounding.U * self.center.abs()).clamp_min(0)
        offset = (x - self.center).clamp(-inside, inside)
        size = offset.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        return self.center + offset * torch.clamp(self.radius * (1 - 1e-9) / size, max=1.0)


def around(region: Region, shape: tuple[int, ...]) -> Around:
    """The centre form of a region for samples of a shape.

    Raises:
        ArgumentError: if the region does not fit.
    """
    size = int(torch.Size(shape).numel())
    if isinstance(region, NormBall):
        radius = _positive(region.radius)
        return Around(torch.zeros(size, dtype=torch.float64), radius, torch.full((size,), radius, dtype=torch.float64))
    if isinstance(region, Ball):
        center = _sample(region.center, shape, "center")
        radius = _positive(region.eps)
        return Around(center, radius, torch.full((size,), radius, dtype=torch.float64))
    if not isinstance(region, Box):
        raise ArgumentError(f"a region is a Ball, a Box or a NormBall, not {type(region).__name__}")
    lo, hi = _sample(region.lo, shape, "lo"), _sample(region.hi, shape, "hi")
    if bool((lo > hi).any()):
        raise ArgumentError("the box is empty: lo is above hi somewhere")
    center = (lo / 2 + hi / 2).clamp(lo, hi)  # halves first: the sum may overflow
    spread = torch.maximum(hi - center, center - lo) * (1 + 4 * rounding.U) + 4 * rounding.U * center.abs()
    return Around(center, norm_up(spread), spread)


def norm_up(values: Tensor) -> float:
    """An upper bound of the Euclidean norm of non-negative numbers of any size; 0 only for zeros."""
    top = float(values.max()) if values.numel() else 0.0
    if top == 0.0 or math.isinf(top):
        return top
    root = float((values / top).norm()) * (1 + rounding.gamma(values.numel() + 12))
    return rounding.mul_up(top, root)


def described(region: Region) -> str:
    """Which inputs these are, in words."""
    if isinstance(region, NormBall):
        return f"inputs of norm at most {region.radius:g}"
    if isinstance(region, Ball):
        return f"inputs within {region.eps:g} of the centre that the certificate states ({_in_short(region.center)})"
    ends = torch.stack([region.lo, region.hi])
    return f"inputs in the box that the certificate states ({_in_short(ends[0])} to {_in_short(ends[1])})"


def _in_short(sample: Tensor) -> str:
    """A sample's first elements and its size."""
    flat = sample.detach().reshape(-1)
    shown = ", ".join(f"{v:.6g}" for v in flat[:_SHOWN].tolist())
    return f"{shown}{', ...' if len(flat) > _SHOWN else ''}; shape {'x'.join(map(str, sample.shape))}"


def _positive(radius: Any) -> float:
    if not isinstance(radius, int | float | Tensor) or not 0 < radius < float("inf"):
        raise ArgumentError(f"the radius of a region is a positive number, not {radius!r}")
    return float(radius)


def _sample(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} of the region is a tensor of the shape {shape}, not {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ArgumentError(f"{name} of the region must have the shape {shape} of one sample, not {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ArgumentError(f"{name} of the region holds NaN or infinite values")
    return value.detach().to("cpu", torch.float64).reshape(-1)
