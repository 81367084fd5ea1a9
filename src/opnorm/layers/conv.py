"""Convolutions and transposed convolutions, in every geometry that torch offers."""

from torch import nn

from opnorm.errors import InputShapeError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.shapes import refuse_missing, sizes_of
from opnorm.layers.weights import read_weight
from opnorm.operators import Conv, ConvTranspose
from opnorm.operators.conv import PaddingMode

ConvLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTransposeLayer = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@register_layer(nn.Conv1d)
@register_layer(nn.Conv2d)
@register_layer(nn.Conv3d)
def conv(module: ConvLayer, input_shape: Shape | None) -> Conv:
    """Return the convolution; without `input_shape` the one that stands for every input size.

    Raises:
        InputShapeError: if `input_shape` does not fit, or the padding mode leaves no bound for every size.
    """
    padding = _widths(module)
    dims = len(padding)
    name = type(module).__name__
    # Nothing is filled where nothing is padded, and zero padding has the better algorithms.
    mode: PaddingMode = module.padding_mode if any(map(any, padding)) else "zeros"
    spatial = None if input_shape is None else sizes_of(name, input_shape, module.in_channels, dims)
    operator = Conv(
        read_weight(module), spatial, tuple(module.stride), padding, tuple(module.dilation), module.groups, mode
    )
    if spatial is None:
        _check_every_size(name, operator)
    else:
        _check_sizes(name, operator)
    return operator


@register_layer(nn.ConvTranspose1d)
@register_layer(nn.ConvTranspose2d)
@register_layer(nn.ConvTranspose3d)
def conv_transpose(module: ConvTransposeLayer, input_shape: Shape | None) -> ConvTranspose:
    """Return the adjoint of a convolution on the layer's output size, without `input_shape` for every size.

    Raises:
        InputShapeError: if `input_shape` does not fit.
    """
    name = type(module).__name__
    stride, dilation, extra = tuple(module.stride), tuple(module.dilation), tuple(module.output_padding)
    padding = tuple((int(p), int(p)) for p in module.padding)
    weight = read_weight(module)
    adjoint = Conv(weight, None, stride, padding, dilation, module.groups)
    if input_shape is None:
        return ConvTranspose(adjoint, None, extra)
    spatial = sizes_of(name, input_shape, module.in_channels, len(stride))
    axes = zip(spatial, stride, padding, adjoint.reach, extra, strict=True)
    outputs = tuple((n - 1) * s - 2 * p + reach + more + 1 for n, s, (p, _), reach, more in axes)
    if min(outputs) < 1:
        raise InputShapeError(f"{name} crops an input of shape {input_shape} to nothing: output sizes {outputs}")
    return ConvTranspose(Conv(weight, outputs, stride, padding, dilation, module.groups), spatial, extra)


def _widths(module: ConvLayer) -> tuple[tuple[int, int], ...]:
    """What is padded before and after, per axis."""
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if module.padding == "valid":
        return ((0, 0),) * len(module.stride)
    return tuple((int(p), int(p)) for p in module.padding)


def _check_sizes(name: str, operator: Conv) -> None:
    """Refuse inputs that torch would refuse, with the sizes that fit."""
    largest = tuple(max(pair) for pair in operator.padding)
    least = [max(1, reach + 1 - sum(pair)) for reach, pair in zip(operator.reach, operator.padding, strict=True)]
    if operator.mode == "circular":  # torch wraps around at most once
        least = [max(a, pad) for a, pad in zip(least, largest, strict=True)]
    if operator.mode == "reflect":
        least = [max(a, pad + 1) for a, pad in zip(least, largest, strict=True)]
    if any(n < a for n, a in zip(operator.sizes, least, strict=True)):
        raise InputShapeError(
            f"{name} with kernel {operator.kernel}, dilation {operator.dilation} and {operator.mode} padding "
            f"{operator.padding} needs sizes of at least {tuple(least)}, got {operator.sizes}"
        )


def _check_every_size(name: str, operator: Conv) -> None:
    """Refuse paddings for which the size-free supremum of the symbol is no bound."""
    example = f"input_shape=({operator.weight.shape[1] * operator.groups}, *sizes)"
    if operator.mode in {"reflect", "replicate"}:
        refuse_missing(name, f"{operator.mode} padding repeats samples, as many as the size allows", example)
    if operator.mode == "circular":
        axes = zip(operator.padding, operator.reach, strict=True)
        if any(sum(pair) > reach for pair, reach in axes):
            refuse_missing(name, "its circular padding makes the output longer than the input", example)
