"""Maps that keep lengths up to one factor: reorderings, and what is an isometry for every input size."""

from dataclasses import dataclass
from math import prod
from typing import NoReturn

import torch
from torch import Tensor

from opnorm.errors import ArgumentError, InputShapeError
from opnorm.operators.base import LinearOperator


@dataclass(frozen=True, eq=False)
class Permutation(LinearOperator):
    """A reordering: view the sample as `split`, permute those axes by `order`, view the result as `target`.

    Each of the three steps is a bijection of the elements, and the constructor checks that it is one, so the matrix
    is a permutation and the norm is 1 (for every p -> p).

    Attributes:
        source: the shape of one sample.
        split: the axes that `source` is viewed as.
        order: a permutation of the axes of `split`.
        target: the shape of one result.

    Raises:
        ArgumentError: if a step is no bijection.
    """

    source: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is no permutation."""
        if not prod(self.source) == prod(self.split) == prod(self.target):
            raise ArgumentError(f"{self.source}, {self.split} and {self.target} differ in their numbers of elements")
        if min((*self.source, *self.split, *self.target), default=1) < 0:
            raise ArgumentError(f"{self.source}, {self.split} and {self.target} must not hold negative sizes")
        if sorted(self.order) != list(range(len(self.split))):
            raise ArgumentError(f"{self.order} is no permutation of the {len(self.split)} axes of {self.split}")

    @staticmethod
    def reshape(source: tuple[int, ...], target: tuple[int, ...]) -> "Permutation":
        """Return the map that changes the shape and leaves the order of the elements."""
        return Permutation(source, source, tuple(range(len(source))), target)

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        return self.source

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.target

    @property
    def dtype(self) -> torch.dtype:
        """No weight is stored; float64 stands for entries that are exact."""
        return torch.float64

    @property
    def device(self) -> torch.device:  # noqa: D102
        return torch.device("cpu")

    @property
    def terms(self) -> int:  # noqa: D102
        return 1

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        axes = (0, *(1 + axis for axis in self.order))
        return x.reshape(x.shape[0], *self.split).permute(axes).reshape(x.shape[0], *self.target)

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        permuted = [self.split[axis] for axis in self.order]
        axes = (0, *(1 + self.order.index(axis) for axis in range(len(self.order))))
        return y.reshape(y.shape[0], *permuted).permute(axes).reshape(y.shape[0], *self.source)

    def absolute(self) -> "Permutation":  # noqa: D102
        return self


@dataclass(frozen=True, eq=False)
class Isometry(LinearOperator):
    """A map with `|T x|^2 = squared_gain |x|^2` for every x of every size: its l2 norm is `sqrt(squared_gain)`.

    It stands for a layer without its input size (a reordering: 1; zero padding: 1; each sample repeated s times: s)
    and therefore has no shapes and no `apply`.
    """

    squared_gain: int

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        self._refuse()

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        self._refuse()

    @property
    def dtype(self) -> torch.dtype:
        """No weight is stored; float64 stands for entries that are exact."""
        return torch.float64

    @property
    def device(self) -> torch.device:  # noqa: D102
        return torch.device("cpu")

    @property
    def terms(self) -> int:  # noqa: D102
        return 1

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        self._refuse()

    def absolute(self) -> "Isometry":  # noqa: D102
        return self

    def _refuse(self) -> NoReturn:
        raise InputShapeError("this map stands for every input size; give input_shape, one sample without the batch")
