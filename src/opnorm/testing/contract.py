"""Base classes for pytest: one test for each promise."""

from torch import nn

from opnorm.operators import LinearOperator
from opnorm.testing import operator as promises
from opnorm.testing.layer import check_layer


class OperatorContract:
    """Subclass it as `class TestMine(OperatorContract)` and return operators to be checked; pytest does the rest.

    Example:
        >>> import torch
        >>> from opnorm.operators import Diagonal
        >>> from opnorm.testing import OperatorContract
        >>> class TestDiagonal(OperatorContract):
        ...     def operators(self):
        ...         return [Diagonal(torch.tensor([1.0, -2.0])), Diagonal(torch.zeros(3), (2,))]
        >>> TestDiagonal().test_adjoint()
    """

    def operators(self) -> list[LinearOperator]:
        """Return the operators to check: small ones, of every geometry.

        Raises:
            NotImplementedError: unless a subclass says which.
        """
        raise NotImplementedError(f"{type(self).__name__}.operators must return the operators to check")

    def test_shapes(self) -> None:
        """See `opnorm.testing.operator.shapes`."""
        self._each(promises.shapes)

    def test_linearity(self) -> None:
        """See `opnorm.testing.operator.linearity`."""
        self._each(promises.linearity)

    def test_adjoint(self) -> None:
        """See `opnorm.testing.operator.adjoint`."""
        self._each(promises.adjoint)

    def test_absolute(self) -> None:
        """See `opnorm.testing.operator.absolute`."""
        self._each(promises.absolute)

    def test_terms(self) -> None:
        """See `opnorm.testing.operator.terms`."""
        self._each(promises.terms)

    def test_enclosure(self) -> None:
        """See `opnorm.testing.operator.enclosure`."""
        self._each(promises.enclosure)

    def _each(self, promise: promises.Promise) -> None:
        cases = self.operators()
        if not cases:
            raise AssertionError(f"{type(self).__name__}.operators returns nothing to check")
        for operator in cases:
            promise(operator)


class LayerContract:
    """Subclass it as `class TestMine(LayerContract)` and return layers with input shapes.

    Example:
        >>> import torch
        >>> from opnorm.testing import LayerContract
        >>> class TestPooling(LayerContract):
        ...     def layers(self):
        ...         return [(torch.nn.AvgPool1d(2, ceil_mode=True), (1, 3))]
        >>> TestPooling().test_layers()
    """

    def layers(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
        """Return layers to check, each with the shape of one sample.

        Raises:
            NotImplementedError: unless a subclass says which.
        """
        raise NotImplementedError(f"{type(self).__name__}.layers must return the layers to check")

    def test_layers(self) -> None:
        """See `opnorm.testing.check_layer`.

        Raises:
            AssertionError: if there is nothing to check, or a layer breaks a promise.
        """
        cases = self.layers()
        if not cases:
            raise AssertionError(f"{type(self).__name__}.layers returns nothing to check")
        for module, input_shape in cases:
            check_layer(module, input_shape)
