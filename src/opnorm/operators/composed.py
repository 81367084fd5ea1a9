"""Maps made of maps: one after the other, and one times a number."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.errors import ArgumentError, InputShapeError
from opnorm.operators.base import LinearOperator


@dataclass(frozen=True, eq=False)
class Composed(LinearOperator):
    """Maps applied one after the other, the first of `parts` first.

    The product of the norms of the parts is an upper bound of its norm, rarely its value.

    Raises:
        ArgumentError: if there are no parts, or a part does not take what the one before it gives.
    """

    parts: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        """Refuse parts that do not fit."""
        if not self.parts:
            raise ArgumentError("a composition needs at least one part")
        for first, second in pairwise(self.parts):
            given, taken = _shape(first, "out_shape"), _shape(second, "in_shape")
            if given is not None and taken is not None and given != taken:
                raise ArgumentError(
                    f"{type(second).__name__} takes {taken}, but the {type(first).__name__} before it gives {given}"
                )

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        return self.parts[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.parts[-1].out_shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return reduce(torch.promote_types, (part.dtype for part in self.parts))

    @property
    def device(self) -> torch.device:
        """That of the stored weights: what stores none follows its argument."""
        devices = [part.device for part in self.parts]
        return next((device for device in devices if device.type != "cpu"), devices[0])

    @property
    def terms(self) -> int:
        """Sums follow one another, so that their lengths add: (1 + gamma_a)(1 + gamma_b) <= 1 + gamma_(a + b)."""
        return sum(part.terms for part in self.parts)

    @property
    def entry_error(self) -> float:
        """The parts' own errors, and the rounding of an entry and of its majorant."""
        # Complex convolutions are three real ones of sums, hence the factor 8.
        summed = 2 * self.terms * (8 if self.dtype.is_complex else 1)
        errors = (*(part.entry_error for part in self.parts), rounding.gamma(summed))
        growth = rounding.mul_up(*(rounding.add_up(1.0, error) for error in errors))
        return rounding.add_up(growth, -1.0)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return reduce(lambda value, part: part.apply(value), self.parts, x)

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        return reduce(lambda value, part: part.adjoint(value), reversed(self.parts), y)

    def absolute(self) -> "Composed":  # noqa: D102
        return Composed(tuple(part.absolute() for part in self.parts))


@dataclass(frozen=True, eq=False)
class Scaled(LinearOperator):
    """An operator times an exact rational number, such as a mean written as a sum. Norms scale by `|factor|`."""

    operator: LinearOperator
    factor: Fraction

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        return self.operator.in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.operator.out_shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.operator.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.operator.device

    @property
    def terms(self) -> int:  # noqa: D102
        return self.operator.terms + 1

    @property
    def entry_terms(self) -> int:  # noqa: D102
        return self.operator.entry_terms

    @property
    def entry_error(self) -> float:
        """The operator's own error, the rounding of the factor and that of the product."""
        growth = rounding.mul_up(
            rounding.add_up(1.0, self.operator.entry_error), rounding.add_up(1.0, rounding.gamma(2))
        )
        return rounding.add_up(growth, -1.0)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.operator.apply(x) * float(self.factor)

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.operator.adjoint(y) * float(self.factor)

    def absolute(self) -> "Scaled":  # noqa: D102
        return replace(self, operator=self.operator.absolute(), factor=abs(self.factor))


def _shape(operator: LinearOperator, which: str) -> tuple[int, ...] | None:
    """A shape, or None where the operator stands for every size."""
    try:
        shape: tuple[int, ...] = getattr(operator, which)
    except InputShapeError:
        return None
    return shape
