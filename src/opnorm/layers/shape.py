"""Layers that only move elements around, and those that do nothing in evaluation mode."""

from math import prod

from torch import nn

from opnorm.errors import InputShapeError, NotLinearError, UnsupportedLayerError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.shapes import sizes_of
from opnorm.operators import Isometry, Permutation

Reordering = Permutation | Isometry


@register_layer(nn.Identity)
def identity(module: nn.Identity, input_shape: Shape | None) -> Reordering:
    """Return the identity."""
    return Isometry(1) if input_shape is None else Permutation.reshape(input_shape, input_shape)


@register_layer(nn.Dropout)
@register_layer(nn.Dropout1d)
@register_layer(nn.Dropout2d)
@register_layer(nn.Dropout3d)
@register_layer(nn.AlphaDropout)
@register_layer(nn.FeatureAlphaDropout)
def dropout(module: nn.Module, input_shape: Shape | None) -> Reordering:
    """Return the identity, which dropout is in evaluation mode.

    Raises:
        NotLinearError: in training mode, where it is random.
    """
    if module.training:
        raise NotLinearError(f"{type(module).__name__} is random in training mode; call .eval() on it first")
    return Isometry(1) if input_shape is None else Permutation.reshape(input_shape, input_shape)


@register_layer(nn.Flatten)
def flatten(module: nn.Flatten, input_shape: Shape | None) -> Reordering:
    """Return the change of shape.

    Raises:
        UnsupportedLayerError: if it would merge the samples of a batch.
        InputShapeError: if `input_shape` does not have the axes.
    """
    if module.start_dim == 0:
        raise UnsupportedLayerError("Flatten(start_dim=0) merges the samples of a batch; start at 1 or later")
    if input_shape is None:
        return Isometry(1)
    first, last = (_axis("Flatten", axis, input_shape) for axis in (module.start_dim, module.end_dim))
    if first > last:
        raise InputShapeError(f"Flatten from {module.start_dim} to {module.end_dim} does not take {input_shape}")
    merged = prod(input_shape[first : last + 1])
    return Permutation.reshape(input_shape, (*input_shape[:first], merged, *input_shape[last + 1 :]))


@register_layer(nn.Unflatten)
def unflatten(module: nn.Unflatten, input_shape: Shape | None) -> Reordering:
    """Return the change of shape.

    Raises:
        UnsupportedLayerError: if the axis is named, or is that of the batch.
        InputShapeError: if `input_shape` does not have the axis, or its size does not fit.
    """
    dim: int | str = vars(module)["dim"]  # torch takes names as well, and declares numbers only
    if not isinstance(dim, int) or dim == 0:
        raise UnsupportedLayerError(f"Unflatten of the axis {dim!r} has no rule; give the axis as a number >= 1")
    if input_shape is None:
        return Isometry(1)
    axis = _axis("Unflatten", dim, input_shape)
    sizes = [int(n) for n in module.unflattened_size]
    known = prod(n for n in sizes if n != -1)
    filled = [input_shape[axis] // max(known, 1) if n == -1 else n for n in sizes]
    if prod(filled) != input_shape[axis]:
        raise InputShapeError(f"Unflatten to {tuple(sizes)} does not take {input_shape[axis]} in {input_shape}")
    return Permutation.reshape(input_shape, (*input_shape[:axis], *filled, *input_shape[axis + 1 :]))


@register_layer(nn.PixelShuffle)
def pixel_shuffle(module: nn.PixelShuffle, input_shape: Shape | None) -> Reordering:
    """Return the reordering of channels into space.

    Raises:
        InputShapeError: if the channels are no multiple of the square of the factor.
    """
    if input_shape is None:
        return Isometry(1)
    r = module.upscale_factor
    height, width = sizes_of("PixelShuffle", input_shape, None, 2)
    if input_shape[0] % (r * r):
        raise InputShapeError(f"PixelShuffle({r}) takes a multiple of {r * r} channels, got {input_shape}")
    channels = input_shape[0] // (r * r)
    split = (channels, r, r, height, width)
    return Permutation(input_shape, split, (0, 3, 1, 4, 2), (channels, height * r, width * r))


@register_layer(nn.PixelUnshuffle)
def pixel_unshuffle(module: nn.PixelUnshuffle, input_shape: Shape | None) -> Reordering:
    """Return the reordering of space into channels.

    Raises:
        InputShapeError: if a size is no multiple of the factor.
    """
    if input_shape is None:
        return Isometry(1)
    r = module.downscale_factor
    height, width = sizes_of("PixelUnshuffle", input_shape, None, 2)
    if height % r or width % r:
        raise InputShapeError(f"PixelUnshuffle({r}) takes sizes that are multiples of {r}, got {input_shape}")
    channels, h, w = input_shape[0], height // r, width // r
    return Permutation(input_shape, (channels, h, r, w, r), (0, 2, 4, 1, 3), (channels * r * r, h, w))


@register_layer(nn.ChannelShuffle)
def channel_shuffle(module: nn.ChannelShuffle, input_shape: Shape | None) -> Reordering:
    """Return the reordering of channels.

    Raises:
        InputShapeError: if the channels are no multiple of the groups.
    """
    if input_shape is None:
        return Isometry(1)
    if not input_shape or input_shape[0] % module.groups:
        raise InputShapeError(f"ChannelShuffle takes a multiple of {module.groups} channels, got {input_shape}")
    split = (module.groups, input_shape[0] // module.groups, prod(input_shape[1:]))
    return Permutation(input_shape, split, (1, 0, 2), input_shape)


def _axis(name: str, axis: int, shape: Shape) -> int:
    """The axis of a sample, from the axis of a batch."""
    place = axis + len(shape) if axis < 0 else axis - 1
    if not 0 <= place < len(shape):
        raise InputShapeError(f"{name} of axis {axis} does not take samples of shape {shape}")
    return place
