"""Bounds for every input size, held against the symbol on a fine grid in NumPy and against actual sizes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import opnorm
from cases import ORACLE, WEIGHTS, assert_encloses, largest_singular_value, module_matrix
from opnorm.errors import ArgumentError, InputShapeError
from opnorm.layers import to_operator


def folded_symbol(weight, stride, dilation, points):
    """Largest singular values of the strided symbol on a grid, points a multiple of the stride; an independent form."""
    symbol = weight.astype(complex)
    for k, d, n in zip(weight.shape[2:], dilation, points, strict=True):
        wave = np.exp(2j * np.pi * np.outer(np.arange(n), d * np.arange(k)) / n)
        symbol = np.tensordot(symbol, wave, axes=([2], [1]))  # the tap axis becomes a frequency axis at the end
    blocks = np.moveaxis(symbol, (0, 1), (-2, -1))
    for axis, s in enumerate(stride):
        blocks = np.concatenate(np.split(blocks, s, axis=axis), axis=-1) / math.sqrt(s)
    return np.linalg.svd(blocks, compute_uv=False)[..., 0]


def supremum(module, points):
    """Ends between which the supremum of the symbol lies, up to `ORACLE`."""
    weight = (
        module.weight.detach().double().numpy() if not module.weight.is_complex() else module.weight.detach().numpy()
    )
    sizes = [points * s for s in module.stride]
    parts = np.split(weight, module.groups)
    best = max(float(folded_symbol(part, module.stride, module.dilation, sizes).max()) for part in parts)
    cosines = (
        math.cos(math.pi * d * (k - 1) / 2 / n)
        for d, k, n in zip(module.dilation, weight.shape[2:], sizes, strict=True)
    )
    return best, best / math.prod(cosines)


LAYERS = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "1d wide": lambda: nn.Conv1d(2, 3, 9),
    "strided": lambda: nn.Conv2d(2, 3, 3, stride=(2, 1), padding=1),
    "stride beyond the kernel": lambda: nn.Conv1d(2, 2, 2, stride=3),
    "strided and dilated": lambda: nn.Conv2d(2, 2, 3, stride=2, dilation=(2, 3)),
    "dilated": lambda: nn.Conv2d(2, 3, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "1x1": lambda: nn.Conv2d(3, 5, 1),
    "3d": lambda: nn.Conv3d(1, 2, 2, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1),
    "transposed, output padding": lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1, dilation=2),
    "circular": lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
    "complex": lambda: nn.Conv1d(2, 3, 3, dtype=torch.complex128),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "constant", "alternating", "sparse"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_supremum_is_enclosed(name, kind):
    torch.manual_seed(1)
    module = LAYERS[name]()
    with torch.no_grad():
        module.weight.copy_(WEIGHTS[kind](module.weight.real))
    found = opnorm.norm(module)
    below, above = supremum(module, 256 if len(module.stride) == 1 else 152 if len(module.stride) == 2 else 16)
    assert found.lower <= above * (1 + ORACLE), "the lower end is above the supremum"
    assert found.upper >= below * (1 - ORACLE), "the upper end is below an attained value of the symbol"
    assert found.upper <= below * 1.005, "looser than half a per cent"
    assert found.guarantee == "proved" and (found.upper == 0.0 or "all input sizes" in found.note)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "complex"])
def test_every_size_obeys(name):
    torch.manual_seed(2)
    module = LAYERS[name]()
    found = opnorm.norm(module)
    channels, dims = module.in_channels, len(module.stride)
    for n in (1, 2, 3, 5, 8):
        shape = (channels, *(n,) * dims)
        try:
            operator = to_operator(module, shape)
        except InputShapeError:
            continue
        truth = largest_singular_value(module_matrix(module, shape))
        assert truth <= found.upper * (1 + ORACLE)
        sized = opnorm.norm(operator, method="size-free")
        assert_encloses(sized.lower, sized.upper, module_matrix(module, shape))
        assert sized.upper == found.upper and "this one" in sized.note


def test_strided_circular_convolutions():
    """The symbol without stride bounds them and is not attained; with stride it is approached by large sizes."""
    layer = nn.Conv1d(1, 1, 3, stride=2, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[-1.0, 1.0, -1.0]]]))
    truths = [largest_singular_value(module_matrix(layer, (1, n))) for n in (1, 2, 3, 4, 5, 8, 64, 65)]
    found = opnorm.norm(layer)
    assert max(truths) <= found.upper and found.lower <= max(truths) * (1 + ORACLE)
    assert found.lower > 2.2


def test_sums_of_entries_for_every_size():
    layer = nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False)
    weight = layer.weight.detach().double()
    rows = float(weight.abs().sum((1, 2, 3)).max())
    found = opnorm.norm(layer, ord=math.inf)
    assert found.lower <= rows * (1 + 1e-14) and found.upper >= rows * (1 - 1e-14) and found.gap < 1e-12
    columns = float(torch.stack(weight.chunk(2)).abs().sum((1, 3, 4)).max())
    found = opnorm.norm(layer, ord=1)
    assert found.lower == 0.0 and columns * (1 - 1e-14) <= found.upper <= columns * (1 + 1e-12)
    plain = nn.Conv1d(2, 3, 3, bias=False)
    truth = float(plain.weight.detach().double().abs().sum((0, 2)).max())
    found = opnorm.norm(plain, ord=1)
    assert found.gap < 1e-12 and found.lower <= truth * (1 + 1e-14) and found.upper >= truth * (1 - 1e-14)
    with pytest.raises(ArgumentError, match="input_shape"):
        opnorm.norm(plain, ord=(1, 2))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_paddings_without_a_bound_for_every_size(mode):
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode=mode)
    with pytest.raises(InputShapeError, match="input_shape"):
        opnorm.norm(layer)
    with pytest.raises(InputShapeError, match="every input size"):
        opnorm.norm(layer, input_shape=(1, 5), method="size-free")


def test_wide_targets_stay_bounds():
    layer = nn.Conv1d(2, 2, 5)
    below, _ = supremum(layer, 256)
    for rtol in (1e-3, 0.3, 5.0, 1e20):
        assert below * (1 - ORACLE) <= opnorm.norm(layer, rtol=rtol).upper


def test_extreme_scales():
    for scale in (1e-42, 1e37):
        layer = nn.Conv1d(2, 3, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(3, 2, 3).clamp(-3, 3) * scale)
        found, (below, above) = opnorm.norm(layer), supremum(layer, 256)
        assert found.lower <= above * (1 + ORACLE) and found.upper >= below * (1 - ORACLE) and found.gap < 5e-3
