"""Bounds for every input size, held against the symbol on a fine grid in NumPy and against actual sizes."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import opnorm
from cases import ORACLE, WEIGHTS, assert_encloses, largest_singular_value, module_matrix
from opnorm.errors import ArgumentError, InputShapeError
from opnorm.layers import to_operator
from opnorm.norms import select
from opnorm.norms.cells import cover
from opnorm.operators import Conv


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


def highest(module, points):
    """The supremum of the symbol: the best three of a grid's frequencies, each climbed from by Nelder and Mead."""
    weight = module.weight.detach().numpy() if module.weight.is_complex() else module.weight.detach().double().numpy()
    axes = [d * np.arange(k) for k, d in zip(weight.shape[2:], module.dilation, strict=True)]
    sizes = [points * s for s in module.stride]
    aliases = np.stack(np.meshgrid(*(np.arange(s) / s for s in module.stride), indexing="ij"), -1)
    aliases = 2 * np.pi * aliases.reshape(-1, len(axes))

    def gain(part, frequency):
        folded = []
        for moved in frequency + aliases:
            symbol = part.astype(complex)
            for axis, w in zip(axes, moved, strict=True):
                symbol = np.tensordot(symbol, np.exp(1j * w * axis), axes=([2], [0]))
            folded.append(symbol)
        return np.linalg.norm(np.concatenate(folded, 1), 2) / math.sqrt(len(aliases))

    best = 0.0
    for part in np.split(weight, module.groups):
        grid = folded_symbol(part, module.stride, module.dilation, sizes)
        for flat in np.argsort(grid, axis=None)[-3:]:
            place = np.array(np.unravel_index(flat, grid.shape))
            start = 2 * np.pi * place / np.array(sizes)
            options = {
                "xatol": 1e-7,
                "fatol": 1e-15,
                "initial_simplex": start + np.eye(len(axes) + 1, len(axes)) * 0.01,
            }
            found = minimize(lambda w, part=part: -gain(part, w), start, method="Nelder-Mead", options=options)
            best = max(best, -float(found.fun))
    return best


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


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("name", LAYERS)
def test_the_target_is_met_around_the_supremum(name, rtol):
    torch.manual_seed(5)
    module = LAYERS[name]()
    found, truth = opnorm.norm(module, rtol=rtol), highest(module, 24 if len(module.stride) < 3 else 12)
    assert truth <= found.upper * (1 + ORACLE) and found.lower <= truth * (1 + 1e-9)
    assert found.met and found.upper <= truth * (1 + rtol)


def shifts(channels, *taps):
    """Every channel moved by itself: singular values of 1 at all frequencies, from taps everywhere."""
    kernel = torch.zeros(channels, channels, *taps)
    for channel in range(channels):
        kernel[(channel, channel, *np.unravel_index(channel % math.prod(taps), taps))] = 1.0
    return kernel


@pytest.mark.parametrize(
    ("kernel", "rtol", "gap"),
    [
        (shifts(9, 3, 3), 1e-3, 1e-3),
        (shifts(9, 3, 3), 1e-6, 4e-3),
        (shifts(8, 2, 2, 2), 1e-3, 4e-3 + 1e-5),
        (shifts(9, 9), 1e-6, 4e-3),
        (torch.eye(4)[..., None, None], 1e-6, 1e-6),
    ],
    ids=["2d", "2d, far target", "3d", "1d", "1x1"],
)
def test_a_constant_symbol_costs_no_more_than_it_may(kernel, rtol, gap):
    """There is no maximum to refine around, so the work is bounded, and what is left is small."""
    ones = (1,) * (kernel.ndim - 2)
    found = opnorm.norm(Conv(kernel, None, ones, ((1, 1),) * len(ones), ones), rtol=rtol)
    assert 1 in found and found.gap <= gap


def test_zero_taps_cost_nothing():
    kernel = torch.zeros(4, 4, 3, 3)
    torch.nn.init.orthogonal_(kernel[..., 1, 2])
    assert opnorm.norm(Conv(kernel, None, (1, 1), ((1, 1),) * 2, (1, 1)), rtol=1e-6).met


@pytest.mark.parametrize("halved", [True, False])
@pytest.mark.parametrize(
    ("types", "stride"),
    [((1.0,), (1,)), ((2.0,), (3,)), ((1.0, 1.5), (1, 1)), ((1.5, 1.0), (2, 3)), ((0.0, 1.0, 2.0), (2, 1, 1)),
     ((1.0, 0.5, 1.0), (1, 2, 1))],
    ids=str,
)  # fmt: skip
def test_cells_cover_the_torus(types, stride, halved):
    """Every frequency, or its mirror image, is within the angle of a centre, at every level of division."""
    tiling = cover(types, stride, 0.8, halved=halved)
    cells = tiling.centres()
    rng = np.random.default_rng(0)
    for level in range(3):
        sizes = np.array(tiling.at_level(level))
        period = 2 * np.pi / np.array(stride)
        points = rng.uniform(0, period, (40, len(types)))
        points = np.stack([points, -points if halved else points], 1)
        centres = 2 * np.pi * cells.numpy() / sizes
        apart = (points[:, :, None] - centres + period / 2) % period - period / 2
        distance = (np.abs(apart) * np.array(types)).sum(-1)
        assert distance.min((1, 2)).max() <= tiling.angle(level) <= 0.8 / 2**level
        cells = tiling.divided(cells)


def test_plans_name_the_method_that_runs():
    for module in (nn.AvgPool2d(3, 2), nn.Conv2d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)):
        assert select(to_operator(module, None)).method == opnorm.norm(module).method == "size-free"


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
