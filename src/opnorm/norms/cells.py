"""Cells that cover the torus of frequencies, as points of a grid that doubles when they are divided.

Axes go in pairs. In steps of the grid, a cell of a pair holds the points with `|x - c_1| + |y - c_2| <= 1`, one of a
single axis those with `|x - c| <= 1`; the centres are the points with `x + y` even, or x even. On the grid of half the
step the centres `c + e`, with e a unit vector of either sign, cover the cell: turned by 45 degrees, the cell of a pair
is a square and these are its quarters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding

_PI = rounding.up(math.pi)


@dataclass(frozen=True)
class Cover:
    """Where cells start.

    Attributes:
        types: exponential type of the symbol along each axis; where it is 0 nothing changes.
        sizes: points of the coarsest grid per axis; those of level l are `2**l` times as many.
        stride: per axis; the symbol repeats after `sizes / stride` points, an even number where the type is not 0.
        halved: whether the symbol is as large at -w as at w.
    """

    types: tuple[float, ...]
    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    halved: bool

    def at_level(self, level: int) -> tuple[int, ...]:
        """Points of the grid per axis."""
        return tuple(n << level if tau else n for n, tau in zip(self.sizes, self.types, strict=True))

    def angle(self, level: int) -> float:
        """Return an upper bound of `sum tau_i |w_i - c_i|` over a cell with centre c."""
        steps = [
            rounding.mul_up(2 * tau, _PI, rounding.div_up(1.0, float(n)))
            for tau, n in zip(self.types, self.at_level(level), strict=True)
        ]
        return rounding.add_up(*(max(steps[axis] for axis in pair) for pair in pairs(self.types)))

    def centres(self) -> Tensor:
        """Return the coarsest cells, integers of shape (cells, d); where halved, of a cell and its mirror image one."""
        spans = [n // s for n, s in zip(self.sizes, self.stride, strict=True)]
        axes = [torch.arange(n if tau else 1) for n, tau in zip(spans, self.types, strict=True)]
        points = torch.cartesian_prod(*axes).reshape(-1, len(spans))
        for pair in pairs(self.types):
            points = points[points[:, pair].sum(1) % 2 == 0]
        if not self.halved:
            return points
        place = torch.tensor([math.prod(spans[axis + 1 :]) for axis in range(len(spans))])
        return points[points @ place <= (-points % torch.tensor(spans)) @ place]

    def divided(self, cells: Tensor) -> Tensor:
        """Return cells of the next level that cover these, shape (2**axes * cells, d)."""
        unit = torch.eye(len(self.types), dtype=cells.dtype, device=cells.device)
        cells = torch.where(torch.tensor(self.types, device=cells.device) > 0, 2 * cells, cells)
        for pair in pairs(self.types):
            moves = torch.cat([unit[pair], -unit[pair]])
            cells = (cells[:, None] + moves).flatten(0, 1)
        return cells


def pairs(types: tuple[float, ...]) -> list[list[int]]:
    """Return the axes along which the symbol changes, in twos."""
    active = [axis for axis, tau in enumerate(types) if tau]
    return [active[i : i + 2] for i in range(0, len(active), 2)]


def cover(types: tuple[float, ...], stride: tuple[int, ...], angle: float, *, halved: bool) -> Cover:
    """Return the coarsest cells with `Cover.angle(0)` about `angle` or less."""
    share = angle / max(1, sum(tau > 0 for tau in types))
    sizes = list(stride)
    for pair in pairs(types):
        for axis in pair:
            sizes[axis] *= 2 * max(1, math.ceil(math.pi * types[axis] / (stride[axis] * share * len(pair))))
    return Cover(types, tuple(sizes), stride, halved)
