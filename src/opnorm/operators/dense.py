"""A matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.operators.base import LinearOperator, magnitude


@dataclass(frozen=True, eq=False)
class Dense(LinearOperator):
    """The map `x -> W x` for `W` of shape (m, n)."""

    weight: Tensor  # shape: (m, n)

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        return (self.weight.shape[1],)

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.weight.shape[0],)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.weight.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.weight.device

    @property
    def terms(self) -> int:  # noqa: D102
        return self.weight.shape[1]

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return x @ self.weight.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        return y @ self.weight.to(y.dtype).conj()

    def absolute(self) -> "Dense":  # noqa: D102
        return Dense(magnitude(self.weight))
