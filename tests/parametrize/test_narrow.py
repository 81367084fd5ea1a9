"""Weights of 16 bits, and 16 bits around weights, at every magnitude: against NumPy in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import opnorm
from parametrize.oracle import matrix_norm

ROWS, COLUMNS = 64, 96
# Its norm is most of its Frobenius norm: where the entries are large, it is no number of 16 bits.
COMMON = (np.linspace(-1, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 2) * np.cos(np.arange(COLUMNS))

MAGNITUDES = {
    torch.float16: (2e4, 6e2, 1.0, 1e-4, 1e-7),  # subnormal from 6e-5 on
    torch.bfloat16: (1e30, 6e2, 1.0, 1e-7, 1e-30),
    torch.float32: (1e30, 1.0, 1e-30),
}


WAYS = {
    "read": lambda layer: layer.weight * 1,
    "call": lambda layer: layer(torch.eye(COLUMNS, dtype=layer.bias.dtype)).mT,
    "conv": lambda layer: layer(torch.eye(COLUMNS, dtype=layer.bias.dtype)[:, :, None])[..., 0].mT,
}
CASES = [(dtype, size) for dtype, sizes in MAGNITUDES.items() for size in sizes]


def linear(dtype, size, way="read", **options):
    layer = nn.Conv1d(COLUMNS, ROWS, 1) if way == "conv" else nn.Linear(COLUMNS, ROWS)
    nn.init.zeros_(layer.bias)
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(size * COMMON).reshape(layer.weight.shape))
    return opnorm.spectral_norm(layer, **options)


def raw_of(layer):
    return layer.parametrizations.weight.original


def matrix(weight):
    return weight.detach().double().numpy().reshape(ROWS, COLUMNS)


def quotient_and_slope(weight, gradient):
    """`W / sigma` and its gradient."""
    left, values, right = np.linalg.svd(weight)
    along = np.sum(gradient * weight)
    slope = gradient / values[0] - along / values[0] ** 2 * np.outer(left[:, 0], right[0])
    return weight / values[0], slope


def assert_rounded(found, wanted, dtype):
    info = torch.finfo(dtype)
    allowed = 4 * info.eps * np.abs(wanted).max() + 2 * info.smallest_normal * info.eps
    if dtype == torch.float32:
        allowed *= 50  # of the iteration
    assert np.abs(matrix(found) - wanted).max() <= allowed


def gradient_for(layer):
    """One whose quotient by the norm is a number of 16 bits."""
    norm = matrix_norm(raw_of(layer).flatten(1))
    normal = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return (normal * min(norm, 1e4)).to(layer.bias.dtype)


@pytest.mark.parametrize(("dtype", "size"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_value_and_gradient(dtype, size, way):
    layer = linear(dtype, size, way)
    gradient = gradient_for(layer)
    value = WAYS[way](layer)
    value.backward(gradient)
    quotient, slope = quotient_and_slope(matrix(raw_of(layer)), matrix(gradient))
    assert_rounded(value, quotient, dtype)
    assert_rounded(raw_of(layer).grad, slope, dtype)


@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_value_and_gradient_in_a_graph(dtype):
    layers = [linear(dtype, size) for size in MAGNITUDES[dtype]]
    graph = torch.compile(lambda: [layer.weight * 1 for layer in layers], backend="aot_eager", fullgraph=True)
    for layer, value in zip(layers, graph(), strict=True):
        gradient = gradient_for(layer)
        value.backward(gradient, retain_graph=True)
        quotient, slope = quotient_and_slope(matrix(raw_of(layer)), matrix(gradient))
        assert_rounded(value, quotient, dtype)
        assert_rounded(raw_of(layer).grad, slope, dtype)
        raw_of(layer).grad = None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_under_autocast(dtype):
    layers = [linear(torch.float32, size) for size in MAGNITUDES[torch.float32]]
    graph = torch.compile(lambda: [layer.weight * 1 for layer in layers], backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        found = graph()
    for layer, value, size in zip(layers, found, MAGNITUDES[torch.float32], strict=True):
        gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
        value.backward(gradient, retain_graph=True)
        quotient, slope = quotient_and_slope(matrix(raw_of(layer)), matrix(gradient))
        assert_rounded(value, quotient, torch.float32)
        # Products of the backward are cast; the gradient goes with one over the weight.
        assert_rounded(raw_of(layer).grad.double() * size, slope * size, dtype)


@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_the_projector(dtype, size):
    layer = nn.Linear(COLUMNS, ROWS).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(size * COMMON))
    raw = matrix(layer.weight)
    opnorm.Projector(layer).step_()
    assert_rounded(layer.weight, raw / np.linalg.norm(raw, 2), dtype)


SCALES = [  # of the weight, of the scale, and a K above which its nearest number is
    (torch.float32, torch.float32, 0.1),
    (torch.float64, torch.float32, 0.1),
    (torch.bfloat16, torch.bfloat16, 3.31),
    (torch.float16, torch.float16, 1e5),
]


@pytest.mark.parametrize(("dtype", "learned", "bound"), SCALES)
def test_a_learned_scale_is_not_rounded_above_its_bound(dtype, learned, bound):
    layer = linear(dtype, 1.0, lipschitz=bound, learn_scale=True)
    rule = layer.parametrizations.weight[0].to(learned)
    raw = matrix(raw_of(layer))
    for theta in (0.5, 40.0):
        nn.init.constant_(rule.scale, theta)
        wanted = bound / (1 + np.exp(-theta))
        found = layer.train().weight
        assert_rounded(found.float(), wanted * raw / np.linalg.norm(raw, 2), min(dtype, torch.float32, key=_digits))
        assert matrix_norm(layer.eval().weight) <= min(bound, wanted * (1 + 1e-6))


def _digits(dtype):
    return -torch.finfo(dtype).eps
