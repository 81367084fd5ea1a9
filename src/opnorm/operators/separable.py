"""Maps that act on every channel alike and on every axis by a matrix: pooling, padding, resampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.operators.base import LinearOperator

Row = Mapping[int, Fraction]
"""One row of a matrix: the exact entry of each column that is not zero."""


@dataclass(frozen=True, eq=False)
class Separable(LinearOperator):
    """The Kronecker product `I_channels x A_1 x ... x A_d`, acting on (channels, n_1, ..., n_d).

    Its norm is the product of the norms of the factors.

    Attributes:
        channels: number of channels.
        factors: per axis, float64 matrices of shape (m_i, n_i).
        factor_error: how far an entry of a factor may be off the intended one, relative to itself.
    """

    channels: int
    factors: tuple[Tensor, ...]
    factor_error: float = 0.0

    @staticmethod
    def from_rows(channels: int, axes: Sequence[tuple[Sequence[Row], int]]) -> "Separable":
        """Round exact entries once; each axis is given by its rows and its number of columns."""
        exact = all(Fraction(float(entry)) == entry for rows, _ in axes for row in rows for entry in row.values())
        return Separable(channels, tuple(_matrix(*axis) for axis in axes), 0.0 if exact else rounding.U)

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        return (self.channels, *(factor.shape[1] for factor in self.factors))

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.channels, *(factor.shape[0] for factor in self.factors))

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.factors[0].dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.factors[0].device

    @cached_property
    def terms(self) -> int:
        """Sums follow one another, so that their lengths add: (1 + gamma_a)(1 + gamma_b) <= 1 + gamma_(a + b)."""
        return sum(int((factor != 0).sum(dim=1).max()) for factor in self.factors)

    @cached_property
    def entry_error(self) -> float:
        """One relative error of each factor's entry, and one of each product."""
        if self.factor_error == 0.0 and all(map(_powers_of_two, self.factors)):
            return 0.0
        return rounding.gamma(2 * len(self.factors))

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        for axis, factor in enumerate(self.factors, start=2):
            x = (x.movedim(axis, -1) @ factor.to(x).mT).movedim(-1, axis)
        return x

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        for axis, factor in enumerate(self.factors, start=2):
            y = (y.movedim(axis, -1) @ factor.to(y)).movedim(-1, axis)
        return y

    def absolute(self) -> "Separable":  # noqa: D102
        return replace(self, factors=tuple(factor.abs() for factor in self.factors))


def _matrix(rows: Sequence[Row], columns: int) -> Tensor:
    matrix = torch.zeros(len(rows), columns, dtype=torch.float64)
    places = [(i, j, float(entry)) for i, row in enumerate(rows) for j, entry in row.items()]
    if places:
        index_i, index_j, entries = zip(*places, strict=True)
        matrix[list(index_i), list(index_j)] = torch.tensor(entries, dtype=torch.float64)
    return matrix


def _powers_of_two(factor: Tensor) -> bool:
    """Whether products with the entries are exact."""
    return bool(torch.isin(torch.frexp(factor.abs())[0], torch.tensor([0.0, 0.5], dtype=factor.dtype)).all())
