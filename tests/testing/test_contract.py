"""The contract suite passes what is right and fails each kind of mistake."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from cases import LAYERS, WEIGHTED, WEIGHTS, Case, by_name, converted
from opnorm import testing
from opnorm.layers import register_layer, to_operator
from opnorm.operators import Composed, Dense, Diagonal, LinearOperator, Permutation, Scaled, Separable
from opnorm.testing import LayerContract, OperatorContract, check_layer, check_operator
from opnorm.testing import operator as promises

MATRIX = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


class TestOperators(OperatorContract):
    def operators(self) -> list[LinearOperator]:
        complex_matrix = torch.complex(MATRIX, MATRIX.flip(0))
        separable = Separable(2, (MATRIX.double(), torch.eye(2, dtype=torch.float64)))
        return [
            Dense(MATRIX),
            Dense(complex_matrix),
            Dense(torch.zeros(2, 3)),
            Diagonal(torch.tensor([1.0, -2.0]), (2,)),
            Diagonal(torch.tensor([1.0 + 2j, -2.0])),
            Permutation((4, 3), (2, 2, 3), (1, 2, 0), (12,)),
            separable,
            Scaled(separable, Fraction(-1, 3)),
            Composed((Dense(MATRIX), Dense(MATRIX.mT), Scaled(Dense(MATRIX), Fraction(2)))),
        ]


class TestLayers(LayerContract):
    def layers(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
        return [(case.build(), case.shape) for case in LAYERS[::4]] + [
            (nn.Linear(3, 2), (2, 3)),
            (converted(nn.Conv1d(2, 2, 2), torch.complex64), (2, 4)),
            (nn.BatchNorm1d(3), (3,)),  # in training mode: checked in evaluation mode, and left as it is
        ]


@pytest.mark.parametrize("fill", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("case", **by_name(WEIGHTED[1::9]))
def test_adversarial_weights_keep_the_contract(case: Case, fill) -> None:
    check_layer(case.build(fill), case.shape)


class WrongShape(Dense):
    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.weight.shape[0] + 1,)


class SingleOnly(Dense):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x[:1])


class Narrow(Dense):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x.float())


class Affine(Dense):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x) + 1


class Rectified(Dense):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x).relu()


class Mixing(Dense):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x.roll(1, 0))


class Unconjugated(Dense):
    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.weight.to(y.dtype)


class Signed(Dense):
    def absolute(self) -> Dense:
        return self


class ComplexMajorant(Dense):
    def absolute(self) -> Dense:
        return Dense(self.weight.abs().to(self.weight.dtype))


class Modest(Dense):
    terms = 1


class Nothing(Dense):
    entry_terms = 0


BROKEN = [
    (WrongShape(MATRIX), "shapes", "apply gives"),
    (SingleOnly(MATRIX), "shapes", "apply gives"),
    (Narrow(MATRIX), "shapes", "turn torch.float64 into torch.float32"),
    (Affine(MATRIX), "linearity", "adds a constant"),
    (Rectified(MATRIX), "linearity", "not linear"),
    (Mixing(MATRIX), "linearity", "mixes the samples"),
    (Unconjugated(torch.complex(MATRIX, MATRIX)), "adjoint", "off the conjugate transpose"),
    (Signed(MATRIX), "absolute", "below the modulus"),
    (ComplexMajorant(torch.complex(MATRIX, MATRIX)), "absolute", "complex entries"),
    (Modest(MATRIX), "terms", "terms is 1, too few"),
    (Nothing(MATRIX), "terms", "entry_terms is 0"),
    (dataclasses.replace(Diagonal(MATRIX[0]), scale_error=2.0), "terms", "entry_error is 2.0"),
]


@pytest.mark.parametrize(("operator", "promise", "message"), BROKEN, ids=lambda value: type(value).__name__)
def test_each_broken_promise_is_seen(operator: LinearOperator, promise: str, message: str) -> None:
    with pytest.raises(AssertionError, match=f"{type(operator).__name__}: .*{message}"):
        promises.PROMISES[promise](operator)
    with pytest.raises(AssertionError):
        check_operator(operator)


def test_rounding_beyond_the_error_terms_is_seen() -> None:
    class Cancelling(Dense):
        def apply(self, x: Tensor) -> Tensor:
            return (x + 1e6) @ self.weight.to(x.dtype).mT - torch.full_like(x, 1e6) @ self.weight.to(x.dtype).mT

    with pytest.raises(AssertionError, match="more than terms and entry_error allow"):
        promises.terms(Cancelling(MATRIX))


def test_a_norm_outside_its_enclosure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = testing.singular_value(MATRIX.double())
    for lower, upper in ((0.0, truth * (1 - 1e-9)), (truth * (1 + 1e-9), 10.0)):
        wrong = dataclasses.replace(promises.norm(Dense(MATRIX)), lower=lower, upper=upper)
        with monkeypatch.context() as patched:
            patched.setattr(promises, "norm", lambda _, wrong=wrong: wrong)
            with pytest.raises(AssertionError, match="is outside"):
                promises.enclosure(Dense(MATRIX))


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Mutated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Narrowed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@register_layer(Halved)
def _halved(module: Halved, input_shape: tuple[int, ...] | None) -> Dense:
    return Dense(module.weight.detach())


@register_layer(Mutated)
def _mutated(module: Mutated, input_shape: tuple[int, ...] | None) -> Dense:
    weight = module.weight.detach().clone()
    module.weight.data.mul_(2)
    return Dense(weight)


@register_layer(Narrowed)
def _narrowed(module: Narrowed, input_shape: tuple[int, ...] | None) -> Dense:
    return Dense(module.weight.detach()[:, :2])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Halved(3, 2), "another map than the module"),
        (Mutated(3, 2), "changes the module: weight"),
        (Narrowed(3, 2), "the operator takes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_rules_are_seen(layer: nn.Module, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_layer(layer, (3,))


def test_the_layer_stays_as_it_is() -> None:
    layer = nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2), nn.Dropout())
    layer[1].eval()
    modes = [part.training for part in layer.modules()]
    check_layer(layer, (2, 5))
    assert [part.training for part in layer.modules()] == modes


def test_contracts_without_cases_fail() -> None:
    with pytest.raises(NotImplementedError, match=r"OperatorContract\.operators"):
        OperatorContract().test_shapes()
    with pytest.raises(NotImplementedError, match=r"LayerContract\.layers"):
        LayerContract().test_layers()

    class NoOperators(OperatorContract):
        def operators(self) -> list[LinearOperator]:
            return []

    class NoLayers(LayerContract):
        def layers(self) -> list[tuple[nn.Module, tuple[int, ...]]]:
            return []

    with pytest.raises(AssertionError, match="nothing to check"):
        NoOperators().test_terms()
    with pytest.raises(AssertionError, match="nothing to check"):
        NoLayers().test_layers()


def test_the_dense_twin_of_an_operator_without_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="input_shape"):
        check_operator(to_operator(nn.Identity()))
