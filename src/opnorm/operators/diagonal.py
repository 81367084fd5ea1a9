"""One factor for each channel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opnorm.errors import InputShapeError
from opnorm.operators.base import LinearOperator, magnitude


@dataclass(frozen=True, eq=False)
class Diagonal(LinearOperator):
    """The map `x -> scale * x`, with one factor for each index of the first axis. Its norm is the largest `|scale|`.

    Attributes:
        scale: shape (channels,).
        sizes: the sizes of the other axes; None stands for every size (then there are no shapes and no `apply`).
        scale_error: how far a factor may be off the intended one, relative to itself.
    """

    scale: Tensor
    sizes: tuple[int, ...] | None = ()
    scale_error: float = 0.0

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        if self.sizes is None:
            raise InputShapeError("this diagonal map stands for every input size; give input_shape=(channels, *sizes)")
        return (self.scale.shape[0], *self.sizes)

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.in_shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.scale.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.scale.device

    @property
    def terms(self) -> int:  # noqa: D102
        return 1

    @property
    def entry_error(self) -> float:  # noqa: D102
        return self.scale_error

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * self._spread(self.scale.to(x))

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        return y * self._spread(self.scale.to(y).conj())

    def absolute(self) -> "Diagonal":  # noqa: D102
        return replace(self, scale=magnitude(self.scale))

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.reshape(self.in_shape[0], *(1 for _ in self.in_shape[1:]))
