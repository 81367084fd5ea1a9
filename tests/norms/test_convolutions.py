"""Convolutions in every geometry, by every method that takes them, against the matrices that torch applies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import opnorm
from cases import (
    CONV,
    CONV_TRANSPOSE,
    WEIGHTS,
    assert_encloses,
    by_name,
    converted,
    largest_singular_value,
    module_matrix,
)
from exact_norm import norm_at_most
from opnorm.errors import ArgumentError, InputShapeError, TooLargeError, WeightError
from opnorm.layers import to_operator
from opnorm.norms import select
from opnorm.norms.banded import banded_fits
from opnorm.norms.fourier import torus_sizes
from opnorm.norms.materialised import majorant_norm, matrix_of
from opnorm.operators import Composed, Conv, Dense, Diagonal

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


def line(taps, n=None, *, pad=0, stride=1, dilation=1, mode="zeros"):
    """A one-dimensional convolution from one channel to one."""
    weight = torch.as_tensor(taps)[None, None]
    return Conv(weight, None if n is None else (n,), (stride,), ((pad, pad),), (dilation,), 1, mode)


def methods_for(operator):
    """Every method that encloses a convolution at its size."""
    conv = getattr(operator, "conv", operator)
    names = ["auto", "torus", "dense"]
    names += ["banded"] if banded_fits(operator) else []
    grows = any(sum(pair) > reach for pair, reach in zip(conv.padding, conv.reach, strict=True))
    names += ["size-free"] if conv.mode == "zeros" or (conv.mode == "circular" and not grows) else []
    return names


def assert_every_method(module, shape):
    operator, matrix = to_operator(module, shape), module_matrix(module, shape)
    for method in methods_for(operator):
        found = opnorm.norm(operator, method=method)
        assert found.guarantee == "proved"
        assert_encloses(found.lower, found.upper, matrix)
    for guarantee in ("probable", "estimate"):
        found = opnorm.norm(operator, guarantee=guarantee)
        assert_encloses(found.lower, found.upper if guarantee == "probable" else math.inf, matrix)


@pytest.mark.parametrize("case", **by_name(CONV + CONV_TRANSPOSE))
def test_geometries(case):
    assert_every_method(case.build(), case.shape)


SHORT = [case for case in CONV + CONV_TRANSPOSE if case.name.startswith(("Conv1d", "ConvTranspose1d", "Conv2d(2,2"))]


@pytest.mark.parametrize("kind", ["constant", "delta", "alternating", "sparse", "zero", "tiny", "huge", "rank-one"])
def test_adversarial_kernels(kind):
    for case in SHORT:
        assert_every_method(case.build(WEIGHTS[kind]), case.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    for case in SHORT:
        assert_every_method(converted(case.build(), dtype), case.shape)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_random_geometries(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dims, groups = draw(1, 3), draw(1, 2)
    top = (9, 5, 3)[dims - 1]
    kernel, dilation, stride, padding, sizes = (
        tuple(draw(low, high) for _ in range(dims)) for low, high in ((1, 4), (1, 3), (1, 3), (0, 5), (1, top))
    )
    mode = data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    torch.manual_seed(draw(0, 99))
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = make(2 * groups, groups, kernel, stride, padding, dilation, groups, padding_mode=mode)
    shape = (2 * groups, *sizes)
    try:
        to_operator(module, shape)
    except InputShapeError:
        return
    assert_every_method(module, shape)


# -- counterexamples: each kills a bound that looks right


def test_a_torus_of_the_input_size_does_not_bound_zero_padding():
    operator = line([-1.0, 0.0, 1.0], 2, pad=1)
    for method in methods_for(operator):
        assert 1.0 in opnorm.norm(operator, method=method)


def test_circular_padding_that_repeats_samples():
    operator = line([1.0], 2, pad=1, mode="circular")
    for method in ("auto", "torus", "dense"):
        found = opnorm.norm(operator, method=method)
        assert found.lower**2 <= 2 <= found.upper**2 * (1 + 1e-15) and found.gap < 1e-6
    with pytest.raises(InputShapeError):
        opnorm.norm(line([1.0], pad=1, mode="circular"))


def test_a_cell_may_not_be_bounded_by_a_product_of_cosines():
    """|1 + exp(i (w1 + w2))| = 2 |cos((w1 + w2) / 2)|: the supremum is 2."""
    kernel = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    found = opnorm.norm(Conv(kernel, None, (1, 1), ((0, 0),) * 2, (1, 1)))
    assert 2.0 in found and found.gap < 5e-3


def test_a_convolution_is_not_its_reshaped_kernel():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    assert opnorm.norm(layer, input_shape=(1, 32, 32)).lower > 8.9  # the reshaped kernel has norm 3


def test_output_padding_of_a_stride_or_more():
    module = nn.ConvTranspose1d(1, 2, 2, stride=2, dilation=4, output_padding=3)
    assert not banded_fits(to_operator(module, (1, 1)))
    with pytest.raises(ArgumentError, match="output_padding"):
        opnorm.norm(module, input_shape=(1, 1), method="banded")
    assert_every_method(module, (1, 1))


@pytest.mark.parametrize("n, pad, most", [(1, 4, 9), (3, 5, 6), (4, 2, 3)])
def test_replicate_padding_counts_what_it_repeats(n, pad, most):
    operator = line([1.0], n, pad=pad, mode="replicate")
    for method in ("torus", "dense", "banded"):
        found = opnorm.norm(operator, method=method)
        assert found.lower**2 <= most * (1 + 1e-15) and found.upper**2 >= most * (1 - 1e-15)


@pytest.mark.parametrize("small", [1.3e-160, 1.3e-124, 1.3e-90, 1.3e-40])
def test_taps_that_only_meet_padding(small):
    """The matrix is zero, or far below the largest tap, whose squares alone survive in float64."""
    assert opnorm.norm(line([1.0, 0.0, 0.0], 1, pad=1)).upper == 0.0
    entries = small * torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.0]], dtype=torch.float64)
    weight = torch.stack([torch.eye(2, 3, dtype=torch.float64), entries, torch.zeros_like(entries)], -1)
    operator = Conv(weight, (1,), (1,), ((1, 1),), (1,))
    for method in ("torus", "dense", "banded", "size-free"):
        for conv in (operator, line([1.0, 0.0, 0.0], 1, pad=1)):
            found = opnorm.norm(conv, method=method)
            assert_encloses(found.lower, found.upper, matrix_of(conv))
    for guarantee in ("probable", "estimate"):
        found = opnorm.norm(operator, guarantee=guarantee)
        assert_encloses(found.lower, found.upper if guarantee == "probable" else math.inf, entries)


def test_subnormal_taps_beside_large_ones_keep_their_last_digit():
    """Scaling by the largest tap would round three halves of the smallest number."""
    operator = line(torch.tensor([3.0, 1.5e-323, 0.0], dtype=torch.float64), 1, pad=1)
    for method in ("auto", "dense", "torus", "banded"):
        assert 1.5e-323 in opnorm.norm(operator, method=method)


def test_entries_of_complex_convolutions_are_copied_exactly():
    """torch convolves complex numbers by three real products, which lose small parts beside large ones."""
    weight = torch.tensor([[[1.0 + 1e-12j, 1e-9 - 1j]]], dtype=torch.complex128) / 3
    conv = Conv(weight, (2,), (1,), ((0, 0),), (1,))
    assert torch.equal(matrix_of(conv), weight[0])
    lazy = Conv(weight.conj(), (2,), (1,), ((0, 0),), (1,))
    assert torch.equal(matrix_of(lazy), weight[0].conj().resolve_conj())
    found = opnorm.norm(conv, method="dense")
    assert norm_at_most(weight[0], found.upper) and not norm_at_most(weight[0], math.nextafter(found.lower, 0))
    transposed = nn.ConvTranspose1d(1, 2, 2, bias=False, dtype=torch.complex128)
    operator = to_operator(transposed, (1, 1))
    assert torch.equal(matrix_of(operator).flatten(), transposed.weight.detach().flatten())


def test_sums_of_taps_that_overflow_or_cancel():
    top = torch.full((3,), 1e308, dtype=torch.float64)
    found = opnorm.norm(line(top, 3, pad=2, mode="replicate"))
    assert found.lower >= 1e308 and found.upper == math.inf
    found = opnorm.norm(line([-1.0, 0.0, 1.0], 2, pad=1, mode="circular"))
    assert found.lower == 0.0 and found.upper < 1e-13
    least = torch.full((3,), 5e-324, dtype=torch.float64)
    found = opnorm.norm(line(least, 3, pad=2, mode="replicate"))
    matrix = matrix_of(line(least / 5e-324, 3, pad=2, mode="replicate"))
    assert found.lower / 5e-324 <= largest_singular_value(matrix) <= found.upper / 5e-324


def test_groups_share_one_maximum():
    layer = nn.Conv1d(4, 4, 3, groups=4, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.1, 3.0, 1e-30, 2.999])[:, None, None] * torch.ones(4, 1, 3))
    assert_every_method(layer, (4, 7))
    assert opnorm.norm(layer, input_shape=(4, 7)).gap <= 1e-6


def test_bad_weights_are_refused():
    for value in (math.nan, math.inf):
        for method in ("auto", "torus", "dense", "banded", "size-free"):
            with pytest.raises(WeightError):
                opnorm.norm(line([1.0, value], 4), method=method)
    with pytest.raises(TooLargeError, match="probable"):
        opnorm.norm(Conv(torch.ones(64, 64, 3), (10**6,), (1,), ((1, 1),), (1,)), method="dense")
    with pytest.raises(InputShapeError, match="input_shape"):
        opnorm.norm(line([1.0, 2.0]), method="dense")


# -- the embedding


@settings(deadline=None, derandomize=True, max_examples=80)
@given(*(st.integers(low, high) for low, high in ((1, 5), (1, 4), (1, 3), (1, 3), (0, 7), (0, 7))))
def test_tori_are_large_enough_and_no_larger(n, k, dilation, stride, left, right):
    """Every torus bounds the convolution; none is wider than the condition asks for, but for the stride."""
    reach = dilation * (k - 1)
    if n + left + right <= reach:
        return
    conv = Conv(torch.ones(1, 1, k), (n,), (stride,), ((left, right),), (dilation,))
    least = n + min(reach, max(left, right))
    sizes = [size for (size,) in torus_sizes(conv)]
    assert min(sizes) >= least and min(sizes) < least + stride and all(size % stride == 0 for size in sizes)
    for seed in range(3):
        weight = torch.randn(2, 1, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        conv = Conv(weight, (n,), (stride,), ((left, right),), (dilation,))
        found = opnorm.norm(conv, method="torus")
        assert_encloses(found.lower, found.upper, matrix_of(conv))


# -- composed maps


def test_compositions_do_not_underflow():
    first = Dense(torch.tensor([[1.3e-160]], dtype=torch.float64))
    second = Dense(torch.tensor([[1.7e-162]], dtype=torch.float64))
    found = opnorm.norm(Composed((first, second)))
    assert found.lower <= 2.2e-322 <= found.upper < 3e-322 and found.lower > 0
    assert opnorm.norm(Composed((first, first, first))).upper >= 5e-324
    scaled = Composed(
        (
            Diagonal(torch.tensor([1e200, 1.0], dtype=torch.float64)),
            Diagonal(torch.tensor([1e-200, 1e-200], dtype=torch.float64)),
        )
    )
    found = opnorm.norm(scaled)
    assert found.lower <= 1.0000000001 and found.upper >= 0.9999999999 and found.gap < 1e-6
    assert opnorm.norm(scaled, method="lanczos", guarantee="probable").upper >= 0.9999999999


def test_the_majorant_counts_the_sums_of_every_part():
    """A column of a composition may sum more terms than there are outputs."""
    wide = Dense(torch.full((3000, 1), 0.1, dtype=torch.float64))
    narrow = Dense(torch.full((1, 3000), 0.1, dtype=torch.float64))
    assert majorant_norm(Composed((wide, narrow))) >= 30.000000000000004


# -- what select says is what norm does


@pytest.mark.parametrize("case", **by_name(CONV + CONV_TRANSPOSE))
def test_the_plan_is_what_is_done(case):
    operator = to_operator(case.build(), case.shape)
    for rtol in (1e-6, 1e-2):
        plan = select(operator, rtol=rtol)
        found = opnorm.norm(operator, rtol=rtol)
        assert found.method in {*plan.method.split("+"), "entries", "zero"}
        assert plan.flops > 0 and plan.bytes > 0 and plan.method in str(plan)
    assert select(operator, guarantee="probable").method == "lanczos"


def test_size_free_plans():
    assert select(line([1.0, 2.0])).method == "size-free"
    assert opnorm.norm(line([1.0, 2.0])).method == "size-free"
    assert select(line([1.0, 2.0, 1.0], 8, pad=1, mode="circular")).method == "torus"
    assert select(line([1.0, 2.0, 1.0], 7, pad=1, stride=2, mode="circular")).method == "dense"
