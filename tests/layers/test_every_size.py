"""Operators for every input size, and the sizes that layers ask for."""

import math

import pytest
import torch
from torch import nn

from cases import largest_singular_value, module_matrix
from opnorm.errors import InputShapeError
from opnorm.layers import to_operator
from opnorm.operators import Conv, ConvTranspose, Diagonal, Isometry, Scaled

CIRCULAR = {"padding_mode": "circular"}

GAINS = [
    (nn.Identity(), 1, (3, 4)),
    (nn.Flatten(), 1, (2, 3)),
    (nn.Unflatten(1, (2, -1)), 1, (4, 3)),
    (nn.Dropout().eval(), 1, (2, 3)),
    (nn.PixelShuffle(2), 1, (4, 2, 2)),
    (nn.PixelUnshuffle(2), 1, (1, 4, 2)),
    (nn.ChannelShuffle(2), 1, (4, 2, 2)),
    (nn.ZeroPad2d((1, 0, 2, 3)), 1, (1, 2, 3)),
    (nn.ConstantPad1d(2, 4.0), 1, (1, 3)),
    (nn.ReflectionPad1d(0), 1, (1, 3)),
    (nn.Upsample(scale_factor=(2, 4)), 8, (1, 3, 2)),
    (nn.Upsample(scale_factor=(2,), mode="nearest-exact"), 2, (1, 5)),
    (nn.UpsamplingNearest2d(scale_factor=2), 4, (1, 3, 2)),
]


@pytest.mark.parametrize(("module", "gain", "shape"), GAINS, ids=lambda value: str(value).replace(" ", ""))
def test_isometries(module: nn.Module, gain: int, shape: tuple[int, ...]) -> None:
    operator = to_operator(module)
    assert isinstance(operator, Isometry)
    assert operator.squared_gain == gain
    matrix = module_matrix(module, shape)
    assert torch.equal(matrix.mT @ matrix, gain * torch.eye(matrix.shape[1], dtype=matrix.dtype))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=7),
        nn.Conv1d(2, 3, 3, padding="same", **CIRCULAR),
        nn.Conv2d(2, 2, 3, padding=1, **CIRCULAR),
        nn.Conv2d(2, 2, 3, padding=1, stride=2, **CIRCULAR),
        nn.Conv2d(2, 2, 3, padding_mode="reflect"),  # nothing is padded
        nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1),
    ],
    ids=str,
)
def test_convolutions(layer: nn.Module) -> None:
    operator = to_operator(layer)
    assert isinstance(operator, Conv | ConvTranspose)
    assert operator.spatial is None
    with pytest.raises(InputShapeError, match="every input size"):
        _ = operator.in_shape


@pytest.mark.parametrize(
    "layer", [nn.AvgPool1d(3), nn.AvgPool2d((2, 3), 1, 1), nn.AvgPool2d(2, divisor_override=7)], ids=str
)
def test_average_pooling_is_a_convolution(layer: nn.Module) -> None:
    operator = to_operator(layer)
    assert isinstance(operator, Scaled)
    dims = len(operator.operator.stride)
    shape = (1, *(6,) * dims)
    sized = nn.Conv2d if dims == 2 else nn.Conv1d
    twin = sized(1, 1, operator.operator.kernel, operator.operator.stride, [p for p, _ in operator.operator.padding])
    nn.init.constant_(twin.weight, float(operator.factor))
    torch.testing.assert_close(module_matrix(layer, shape), module_matrix(twin, shape), rtol=1e-6, atol=0)


def test_stored_statistics() -> None:
    layer = nn.BatchNorm2d(3).eval()
    operator = to_operator(layer)
    assert isinstance(operator, Diagonal)
    assert operator.scale.max().item() == pytest.approx(1 / math.sqrt(1 + layer.eps), rel=1e-15)


NEEDS_SIZE = [
    nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
    nn.Conv2d(2, 2, 3, padding=2, **CIRCULAR),
    nn.Conv1d(1, 1, 1, padding=1, **CIRCULAR),
    nn.Conv1d(1, 1, 2, padding=1, **CIRCULAR),
    nn.Conv2d(2, 2, 3, padding=(1, 2), stride=4, **CIRCULAR),
    nn.AvgPool2d(2, ceil_mode=True),
    nn.AvgPool2d(3, padding=1, count_include_pad=False),
    nn.AdaptiveAvgPool2d(1),
    nn.ReflectionPad2d(1),
    nn.ReplicationPad1d((0, 1)),
    nn.CircularPad1d(1),
    nn.ZeroPad2d((1, -1, 0, 0)),
    nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=(3, 3)),
    nn.Upsample(size=4),
    nn.Upsample(scale_factor=(2, 2), mode="bilinear"),
    nn.UpsamplingBilinear2d(scale_factor=2),
]


@pytest.mark.parametrize("layer", NEEDS_SIZE, ids=str)
def test_needs_a_size(layer: nn.Module) -> None:
    with pytest.raises(InputShapeError, match=rf"norm of {type(layer).__name__} depends.*input_shape="):
        to_operator(layer)


def test_circular_padding_that_lengthens_is_above_the_symbol() -> None:
    """Why the size is asked for: one tap, symbol 1 everywhere, and yet the norm is sqrt(2)."""
    layer = nn.Conv1d(1, 1, 1, padding=1, **CIRCULAR)
    nn.init.ones_(layer.weight)
    assert largest_singular_value(module_matrix(layer, (1, 2))) == pytest.approx(math.sqrt(2), rel=1e-14)


MISFITS = [
    (nn.Linear(5, 3), (4,), r"\(\.\.\., 5\)"),
    (nn.Linear(5, 3), (), r"\(\.\.\., 5\)"),
    (nn.Conv2d(3, 4, 3), (4, 8, 8), r"input_shape=\(3, n1, n2\)"),
    (nn.Conv2d(3, 4, 3), (3, 8), r"input_shape=\(3, n1, n2\)"),
    (nn.Conv2d(3, 4, 3), (3, 8, 0), r"input_shape=\(3, n1, n2\)"),
    (nn.Conv2d(3, 4, 3), (1, 3, 8, 8), r"input_shape=\(3, n1, n2\)"),
    (nn.Conv2d(3, 4, (5, 3), padding=1), (3, 2, 8), r"at least \(3, 1\)"),
    (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (3, 2, 8), r"at least \(3, 3\)"),
    (nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (3, 1, 8), r"at least \(2, 2\)"),
    (nn.ConvTranspose2d(3, 4, 3), (4, 2, 2), r"input_shape=\(3, n1, n2\)"),
    (nn.ConvTranspose2d(3, 4, 3, padding=3), (3, 2, 5), "to nothing"),
    (nn.AvgPool2d(3), (1, 2, 5), "larger than the input"),
    (nn.AvgPool2d(3), (1, 5), "n1, n2"),
    (nn.AdaptiveAvgPool2d(3), (5,), "n1, n2"),
    (nn.ReflectionPad1d(3), (1, 3), "does not take"),
    (nn.CircularPad1d(4), (1, 3), "does not take"),
    (nn.ZeroPad1d(-2), (1, 3), "does not take"),
    (nn.PixelShuffle(2), (6, 2, 2), "multiple of 4 channels"),
    (nn.PixelUnshuffle(2), (1, 3, 2), "multiples of 2"),
    (nn.ChannelShuffle(2), (3, 2, 2), "multiple of 2 channels"),
    (nn.Flatten(3), (2, 2), "does not take"),
    (nn.Flatten(2, 1), (2, 2), "does not take"),
    (nn.Unflatten(1, (2, 3)), (5,), "does not take 5"),
    (nn.Unflatten(2, (2, 3)), (6,), "does not take"),
    (nn.BatchNorm2d(3).eval(), (2, 4, 4), r"input_shape=\(3, \.\.\.\)"),
    (nn.Upsample(scale_factor=(2, 2)), (1, 3), "2 sizes"),
    (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3), "n1, n2"),
    (nn.Upsample(scale_factor=0.1), (1, 3), "leaves nothing"),
    (nn.Upsample(scale_factor=2), (1, 2, 2, 2, 2), "1 to 3 sizes"),
]


@pytest.mark.parametrize(("layer", "shape", "message"), MISFITS, ids=lambda value: str(value).replace(" ", ""))
def test_shapes_that_do_not_fit(layer: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputShapeError, match=message) as raised:
        to_operator(layer, shape)
    assert type(layer).__name__ in str(raised.value)


def test_a_number_is_no_shape() -> None:
    with pytest.raises(InputShapeError, match=r"one axis is written \(5,\)"):
        to_operator(nn.Linear(5, 3), 5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, (5, 3), padding=1), (3, 3, 1)),
        (nn.Conv1d(1, 1, 3, padding=2, padding_mode="reflect"), (1, 3)),
        (nn.Conv1d(1, 1, 3, padding=2, padding_mode="circular"), (1, 2)),
        (nn.ConvTranspose1d(1, 1, 3, padding=3), (1, 5)),
    ],
    ids=str,
)
def test_the_smallest_sizes_fit(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert to_operator(layer, shape).out_shape == layer(torch.zeros(1, *shape)).shape[1:]
    smaller = tuple(n - 1 if n > 1 and axis else n for axis, n in enumerate(shape))
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, *smaller))
    with pytest.raises(InputShapeError):
        to_operator(layer, smaller)
