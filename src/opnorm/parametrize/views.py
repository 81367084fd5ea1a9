"""How a stored weight is read as a linear map: blocks of matrices, each acting at one frequency."""

from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from opnorm.norms.fourier import embedded, torus_sizes
from opnorm.operators import Conv, ConvTranspose, Dense, LinearOperator
from opnorm.parametrize.sharding import divisible

Axes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View:
    """A weight as a linear map, without its values.

    A convolution acts at a frequency w by the matrix `K(w) = sum_j K_j exp(i w.p_j)`, which is the kernel read as
    a (c_out, c_in * taps) matrix times a vector of the form `y[c, r_j] exp(i w.p_j)`: the taps of one residue modulo
    the stride share an entry of y. A matrix is the case of one tap. So every weight is (blocks, rows, columns * taps).

    Attributes:
        template: the operator, on the meta device, whose norm is deployed.
        blocks: number of blocks: the groups of a convolution, or matrices stacked in one weight.
        joint: whether the norm is the largest of the blocks'; otherwise each block is divided by its own.
        axis: the axis of the weight that becomes the rows.
        positions: where the taps sit, in units of the input's samples; one tap at 0 for a matrix.
        residues: the class of each tap modulo the stride.
        strides: per axis on which the map varies with the frequency.
        torus: the sizes of the torus on which frequencies live; None where they are continuous.
        slack: by how much the bound that is deployed is above the gain at the best frequency.
        sampled: whether the bound that is deployed is the map's own, which is then applied to samples.
    """

    template: LinearOperator
    blocks: int = 1
    joint: bool = True
    axis: int = 0
    positions: tuple[Axes, ...] = ((),)
    residues: Axes = (0,)
    strides: Axes = ()
    torus: Axes | None = None
    slack: float = 1.0
    sampled: bool = False

    @property
    def taps(self) -> int:
        """Number of taps."""
        return len(self.positions)

    @property
    def frequencies(self) -> int:
        """Number of axes on which the map varies with the frequency."""
        return len(self.positions[0])

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the weight as (blocks, rows, columns * taps)."""
        weight = divisible(weight, self.blocks)
        flat = weight if self.axis == 0 else weight.movedim(self.axis, 0)
        return flat.reshape(self.blocks, flat.shape[0] // self.blocks, -1)

    def weight(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Return what `matrices` returned to the shape of the weight."""
        if self.axis == 0:
            return matrices.reshape(shape)
        moved = torch.Size([shape[self.axis], *(n for i, n in enumerate(shape) if i != self.axis)])
        return matrices.reshape(moved).movedim(0, self.axis)

    def operators(self, weight: Tensor) -> list[LinearOperator]:
        """Return the maps whose norms are deployed, one or one for each block that has its own."""
        if isinstance(self.template, Dense):
            parts = self.matrices(weight)
            return [Dense(part) for part in (parts if not self.joint else parts[:1])]
        return [with_weight(self.template, weight)]


def with_weight(template: LinearOperator, weight: Tensor) -> LinearOperator:
    """Return the operator of the same geometry with another weight."""
    if isinstance(template, ConvTranspose):
        return replace(template, conv=replace(template.conv, weight=weight))
    return replace(template, weight=weight)  # type: ignore[type-var]


def matrix_view(rows: int, columns: int, *, blocks: int = 1, joint: bool = True, axis: int = 0) -> View:
    """Return the view of a weight that is one matrix, or several of one size stacked."""
    return View(Dense(torch.empty(rows, columns, device="meta")), blocks, joint, axis)


def conv_view(operator: Conv | ConvTranspose, *, sampled: bool = False) -> View:
    """Return the view of a convolution; `sampled` where it is to be applied to samples."""
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    template = with_weight(operator, torch.empty(conv.weight.shape, dtype=conv.weight.dtype, device="meta"))
    if sampled:
        return View(template, conv.groups, sampled=True)
    plain, slack = _proved(conv)
    if prod(conv.kernel) == 1:
        return View(template, conv.groups, slack=slack)
    taps = list(product(*(range(k) for k in conv.kernel)))
    positions = tuple(tuple(d * j for d, j in zip(conv.dilation, tap, strict=True)) for tap in taps)
    classes = [tuple(p % s for p, s in zip(position, plain.stride, strict=True)) for position in positions]
    index = {residue: i for i, residue in enumerate(dict.fromkeys(classes))}
    residues = tuple(index[c] for c in classes)
    return View(template, conv.groups, True, 0, positions, residues, plain.stride, _torus(plain), slack)


def is_loose(operator: Conv | ConvTranspose) -> bool:
    """Whether the symbol is of another convolution, whose norm may be far above that of the operator."""
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    return conv.spatial is not None and embedded(conv)[0] is not conv


def _proved(conv: Conv) -> tuple[Conv, float]:
    """The convolution whose symbol is proved, and by how much the deployed bound is above the symbol's maximum."""
    if conv.spatial is not None:
        return embedded(conv)
    # Circular padding of any size may have a length that the stride does not divide.
    return (replace(conv, stride=(1,) * conv.dims) if conv.mode == "circular" else conv), 1.0


def _torus(conv: Conv) -> Axes | None:
    if conv.spatial is None:
        return None
    return tuple(conv.spatial) if conv.mode == "circular" else torus_sizes(conv)[0]
