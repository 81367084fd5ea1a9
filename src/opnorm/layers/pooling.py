"""Average pooling: a mean over windows, axis by axis."""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import nn

from opnorm.errors import InputShapeError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.shapes import per_axis, refuse_missing, sizes_of
from opnorm.operators import Conv, LinearOperator, Scaled, Separable
from opnorm.operators.separable import Row

AvgPool = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
AdaptiveAvgPool = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d


def avg_pool(dims: int, module: AvgPool, input_shape: Shape | None) -> LinearOperator:
    """Return the mean over windows; without `input_shape` the depthwise convolution that it is for every size.

    Raises:
        InputShapeError: if `input_shape` does not fit, or windows at the border have other divisors than the rest.
    """
    kernel, stride, padding = (per_axis(value, dims) for value in (module.kernel_size, module.stride, module.padding))
    divisor = getattr(module, "divisor_override", None)
    name = type(module).__name__
    if input_shape is None:
        return _every_size(module, kernel, stride, padding)
    sizes = sizes_of(name, input_shape, None, dims)
    if any(n + 2 * p < k for n, k, p in zip(sizes, kernel, padding, strict=True)):
        raise InputShapeError(f"{name} with kernel {kernel} and padding {padding} is larger than the input {sizes}")
    axes = [
        (_windows(n, (k, s, p), module.ceil_mode, None if divisor else module.count_include_pad), n)
        for n, k, s, p in zip(sizes, kernel, stride, padding, strict=True)
    ]
    if divisor:  # one divisor for the product of all axes: the first axis carries it
        rows, n = axes[0]
        axes[0] = [{j: entry / divisor for j, entry in row.items()} for row in rows], n
    return Separable.from_rows(input_shape[0], axes)


def adaptive_avg_pool(dims: int, module: AdaptiveAvgPool, input_shape: Shape | None) -> Separable:
    """Return the mean over windows that share the input out among a given number of outputs.

    Raises:
        InputShapeError: without `input_shape`, or if it does not fit.
    """
    name = type(module).__name__
    if input_shape is None:
        refuse_missing(name, "its windows grow with it", "input_shape=(channels, *sizes)")
    sizes = sizes_of(name, input_shape, None, dims)
    asked = module.output_size if isinstance(module.output_size, tuple | list) else [module.output_size] * dims
    outputs = [n if out is None else out for out, n in zip(asked, sizes, strict=True)]
    axes = [(_shares(n, out), n) for n, out in zip(sizes, outputs, strict=True)]
    return Separable.from_rows(input_shape[0], axes)


def _windows(n: int, window: tuple[int, int, int], ceil: bool, count_padding: bool | None) -> Sequence[Row]:
    """Rows of the mean over windows, as torch places and counts them; `count_padding=None` leaves a plain sum."""
    k, s, p = window
    outputs = (n + 2 * p - k + (s - 1 if ceil else 0)) // s + 1
    if ceil and (outputs - 1) * s >= n + p:  # a window must not start in the padding on the right
        outputs -= 1
    rows = []
    for start in range(-p, -p + outputs * s, s):
        end = min(start + k, n + p)
        inside = range(max(start, 0), min(end, n))
        count = 1 if count_padding is None else end - start if count_padding else len(inside)
        rows.append(dict.fromkeys(inside, Fraction(1, max(count, 1))))
    return rows


def _shares(n: int, outputs: int) -> Sequence[Row]:
    """Rows of the mean over the windows from floor(i n / outputs) to ceil((i + 1) n / outputs)."""
    windows = [range(i * n // outputs, -(-(i + 1) * n // outputs)) for i in range(outputs)]
    return [dict.fromkeys(window, Fraction(1, len(window))) for window in windows]


def _every_size(module: AvgPool, kernel: Shape, stride: Shape, padding: Shape) -> Scaled:
    """The depthwise convolution that the pooling is where every window has the same divisor."""
    override = getattr(module, "divisor_override", None)
    if module.ceil_mode or not (module.count_include_pad or override or not any(padding)):
        why = "windows at the border are smaller than the others"
        refuse_missing(type(module).__name__, why, "input_shape=(channels, *sizes)")
    ones = torch.ones(1, 1, *kernel)
    widths = tuple((p, p) for p in padding)
    return Scaled(Conv(ones, None, stride, widths, (1,) * len(kernel)), Fraction(1, override or ones.numel()))


for _dims, _cls in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), start=1):
    register_layer(_cls)(partial(avg_pool, _dims))
for _dims, _cls in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), start=1):
    register_layer(_cls)(partial(adaptive_avg_pool, _dims))
