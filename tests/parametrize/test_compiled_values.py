"""A compiled graph computes the weights and gradients that eager code does, for every way to read a weight."""

import pytest
import torch
from torch import nn

import opnorm

LAYERS = {
    "matrix": (lambda: nn.Linear(20, 30), {}),
    "complex matrix": (lambda: nn.Linear(20, 30, dtype=torch.complex64), {}),
    "q, k and v": (lambda: nn.MultiheadAttention(8, 2), {"name": "in_proj_weight"}),
    "reshaped": (lambda: nn.ConvTranspose2d(4, 6, 3), {"norm": "reshaped"}),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), {}),
    "strided": (lambda: nn.Conv2d(4, 6, 4, 2, 1), {}),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=4), {}),
    "groups of one tap": (lambda: nn.Conv2d(8, 8, 1, groups=2), {}),
    "groups, transposed": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), {}),
    "groups at a size": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4), {"input_shape": (8, 6, 6)}),
    "groups at a large size": (
        lambda: nn.Conv2d(64, 64, 3, padding=1, groups=4, padding_mode="reflect"),
        {"input_shape": (64, 48, 48)},
    ),
    "complex convolution": (lambda: nn.Conv2d(4, 6, 3, dtype=torch.complex64), {}),
    "complex at a size": (
        lambda: nn.Conv2d(3, 3, 3, padding=1, dtype=torch.complex64),
        {"input_shape": (3, 5, 5)},
    ),
    "bfloat16": (lambda: nn.Conv2d(4, 6, 3, dtype=torch.bfloat16), {}),
}


def weight_and_gradient(value, layer, name):
    raw = layer.parametrizations[name].original
    raw.grad = None
    probe = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    value.backward(probe, retain_graph=True)
    return value.detach(), raw.grad


@pytest.fixture(scope="module")
def compiled():
    """All layers in one graph, which is compiled once."""
    torch.manual_seed(0)
    layers = {case: opnorm.spectral_norm(make(), **options) for case, (make, options) in LAYERS.items()}
    names = {case: options.get("name", "weight") for case, (_, options) in LAYERS.items()}
    graph = torch.compile(
        lambda: [getattr(layers[case], names[case]) * 1 for case in LAYERS], backend="aot_eager", fullgraph=True
    )
    return layers, names, dict(zip(LAYERS, graph(), strict=True))


@pytest.mark.parametrize("case", LAYERS)
def test_a_graph_computes_what_eager_code_does(compiled, case):
    layers, names, values = compiled
    layer, name = layers[case], names[case]
    found = weight_and_gradient(values[case], layer, name)
    wanted = weight_and_gradient(getattr(layer, name) * 1, layer, name)
    for a, b in zip(found, wanted, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert float((a - b).abs().max()) <= max(2 * eps, 2e-5) * float(b.abs().max())
