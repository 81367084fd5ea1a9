"""What every linear map offers to the algorithms: shapes, application, adjoint and an entrywise majorant."""

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor


class LinearOperator(ABC):
    """A linear map between spaces of activations, acting on batches.

    Subclasses are frozen dataclasses on tensors; they know nothing of `nn.Module`. `apply` computes in the dtype of
    its argument: the stored weight is cast to it.
    """

    @property
    @abstractmethod
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @property
    @abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """The shape of one result."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weight."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the stored weight."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Apply the map: (batch, *in_shape) -> (batch, *out_shape)."""

    @abstractmethod
    def absolute(self) -> "LinearOperator":
        """Return an operator with non-negative entries, each at least the absolute value of this one's."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """An upper bound of the number of products that `apply` sums for one entry of its result."""

    @property
    def entry_terms(self) -> int:
        """How many stored weights are summed to one entry of the matrix; 1 means that entries are exact copies."""
        return 1

    @property
    def entry_error(self) -> float:
        """How far an entry may be off the intended one, relative to the majorant's; 0 where weights are stored."""
        return 0.0

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the conjugate transpose: (batch, *out_shape) -> (batch, *in_shape)."""
        origin = torch.zeros(y.shape[0], *self.in_shape, dtype=y.dtype, device=y.device)
        pull = torch.func.vjp(self.apply, origin)[1]
        image: Tensor = pull(y)[0]
        return image

    @property
    def in_size(self) -> int:
        """Number of elements of one sample."""
        return prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Number of elements of one result."""
        return prod(self.out_shape)


def magnitude(weight: Tensor) -> Tensor:
    """Return the absolute values of stored weights, in float64 and rounded upward where the weights are complex."""
    if not weight.is_complex():
        return weight.abs()
    # No implementation of hypot is off by 2**-48.
    return weight.to(torch.complex128).abs() * (1 + 2.0**-48)
