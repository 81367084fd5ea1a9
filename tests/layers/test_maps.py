"""Every layer's operator is the map that the module itself applies."""

import pytest
import torch
from torch import nn

from cases import LAYERS, WEIGHTED, WEIGHTS, Case, assert_same_map, by_name, converted, matrix_of, module_matrix
from opnorm.layers import to_operator
from opnorm.operators import LinearOperator


def assert_is_map_of(operator: LinearOperator, module: nn.Module, shape: tuple[int, ...]) -> None:
    truth = module_matrix(module, shape)
    majorant = matrix_of(operator.absolute().apply, operator.in_shape, torch.float64)
    applied = matrix_of(operator.apply, operator.in_shape, truth.dtype)
    pulled = matrix_of(operator.adjoint, operator.out_shape, truth.dtype)
    rounded = 1e-14 * majorant.amax(1, keepdim=True)
    assert bool((majorant + rounded >= truth.abs()).all()), "the majorant is below an entry"
    assert_same_map(applied, truth, majorant)
    assert_same_map(pulled.mH, truth, majorant)


@pytest.mark.parametrize("case", **by_name(LAYERS))
def test_operator_is_the_module(case: Case) -> None:
    module = case.build()
    operator = to_operator(module, case.shape)
    assert_is_map_of(operator, module, case.shape)
    sample = torch.randn(2, *case.shape)
    assert (2, *operator.out_shape) == module(sample).shape


@pytest.mark.parametrize("fill", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("case", **by_name(WEIGHTED[::5]))
def test_operator_is_the_module_with_adversarial_weights(case: Case, fill) -> None:
    module = case.build(fill)
    assert_is_map_of(to_operator(module, case.shape), module, case.shape)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128], ids=str
)
@pytest.mark.parametrize("case", **by_name(WEIGHTED[:3:2] + WEIGHTED[5::6]))
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    module = converted(case.build(), dtype)
    with torch.no_grad():
        module.weight.normal_()  # with an imaginary part
    operator = to_operator(module, case.shape)
    assert operator.dtype == dtype
    assert_is_map_of(operator, module, case.shape)


@pytest.mark.parametrize("case", **by_name(LAYERS))
def test_entries_are_as_near_as_promised(case: Case) -> None:
    """Float64 entries of weightless layers are those of the formulas, up to `entry_error`; torch rounds as well."""
    operator = to_operator(case.build(), case.shape)
    assert 0.0 <= operator.entry_error < 1e-13
    assert operator.terms >= 1


def test_linear_takes_any_leading_axes() -> None:
    layer = nn.Linear(5, 3)
    assert to_operator(layer, (7, 2, 5)).in_shape == (5,)
    assert to_operator(layer).weight.data_ptr() == layer.weight.data_ptr()


def test_embedding_acts_on_one_hot_vectors() -> None:
    layer = nn.Embedding(6, 3, padding_idx=2)
    with torch.no_grad():
        layer.weight[2] = 5.0  # forward returns it all the same
    operator = to_operator(layer)
    tokens = torch.arange(6)
    assert torch.equal(operator.apply(nn.functional.one_hot(tokens, 6).float()), layer(tokens))


def test_embedding_bag_acts_on_counts() -> None:
    layer = nn.EmbeddingBag(6, 3, mode="sum", padding_idx=2)
    with torch.no_grad():
        layer.weight[2] = 5.0  # left out of the sum
    bag = torch.tensor([[0, 2, 2, 5, 5, 5, 1]])
    counts = torch.bincount(bag[0], minlength=6)[None].float()
    torch.testing.assert_close(to_operator(layer).apply(counts), layer(bag))
