"""Convolutions in one to three dimensions, in every geometry that torch offers, and their transposes."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opnorm.errors import InputShapeError
from opnorm.operators.base import LinearOperator, magnitude

PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Conv(LinearOperator):
    """A convolution (torch's cross-correlation) without its bias.

    Attributes:
        weight: shape (c_out, c_in // groups, *kernel).
        spatial: the sizes of the input; None stands for every size (then there are no shapes and no `apply`).
        stride: per axis.
        padding: per axis, what is added before and after.
        dilation: per axis.
        groups: number of independent blocks of channels.
        mode: how the padding is filled.
    """

    weight: Tensor
    spatial: tuple[int, ...] | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    mode: PaddingMode = "zeros"

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps per axis."""
        return tuple(self.weight.shape[2:])

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance between the first and the last tap, per axis: d (k - 1)."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        """Input sizes after padding."""
        return tuple(n + left + right for n, (left, right) in zip(self.sizes, self.padding, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Input sizes, or an error where the operator stands for every size."""
        if self.spatial is None:
            raise InputShapeError("this convolution stands for every input size; give input_shape=(channels, *sizes)")
        return self.spatial

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        return (self.weight.shape[1] * self.groups, *self.sizes)

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        spans = zip(self.padded, self.reach, self.stride, strict=True)
        return (self.weight.shape[0], *((length - reach - 1) // s + 1 for length, reach, s in spans))

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.weight.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.weight.device

    @property
    def terms(self) -> int:  # noqa: D102
        return prod(self.weight.shape[1:])

    @cached_property
    def entry_terms(self) -> int:  # noqa: D102
        if self.mode == "zeros":
            return 1
        # A sample may be read by several taps of one window: at most as often as padding repeats it, and once a tap.
        copies = prod(1 + left + right for left, right in self.padding)
        return min(copies, prod(self.kernel))

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return _CONV[self.dims](self.pad(x), self.weight.to(x.dtype), None, self.stride, 0, self.dilation, self.groups)

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        spans = zip(self.padded, self.reach, self.stride, strict=True)
        left_over = tuple((length - reach - 1) % s for length, reach, s in spans)
        weight = self.weight.to(y.dtype).conj().resolve_conj()
        full = _CONV_TRANSPOSE[self.dims](y, weight, None, self.stride, 0, left_over, self.groups, self.dilation)
        if self.mode == "zeros":
            return _cropped(full, tuple(left for left, _ in self.padding), self.sizes)
        origin = torch.zeros(y.shape[0], *self.in_shape, dtype=y.dtype, device=y.device)
        image: Tensor = torch.func.vjp(self.pad, origin)[1](full)[0]
        return image

    def pad(self, x: Tensor) -> Tensor:
        """Pad a batch the way the convolution does."""
        widths = [width for pair in reversed(self.padding) for width in pair]
        if not any(widths):
            return x
        return F.pad(x, widths, mode="constant" if self.mode == "zeros" else self.mode)

    def absolute(self) -> "Conv":  # noqa: D102
        return replace(self, weight=magnitude(self.weight))


@dataclass(frozen=True, eq=False)
class ConvTranspose(LinearOperator):
    """A transposed convolution: the adjoint of `conv`, which acts on this map's *output* size.

    Attributes:
        conv: zero-padded, with this map's weight read as (c_out, c_in // groups, *kernel) of the convolution.
        spatial: the sizes of this map's input; None stands for every size.
        output_padding: per axis.
    """

    conv: Conv
    spatial: tuple[int, ...] | None
    output_padding: tuple[int, ...]

    @property
    def in_shape(self) -> tuple[int, ...]:  # noqa: D102 - see LinearOperator
        if self.spatial is None:
            return self.conv.out_shape  # raises, naming the missing sizes
        return (self.conv.weight.shape[0], *self.spatial)

    @property
    def out_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.conv.in_shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.conv.dtype

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.conv.device

    @property
    def terms(self) -> int:  # noqa: D102
        return self.conv.weight.shape[0] // self.conv.groups * prod(self.conv.kernel)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        conv = self.conv
        padding = tuple(left for left, _ in conv.padding)
        weight = conv.weight.to(x.dtype)
        return _CONV_TRANSPOSE[conv.dims](
            x, weight, None, conv.stride, padding, self.output_padding, conv.groups, conv.dilation
        )

    def adjoint(self, y: Tensor) -> Tensor:  # noqa: D102
        conv = replace(self.conv, weight=self.conv.weight.conj().resolve_conj())
        # With output_padding >= stride the convolution has more outputs than this map has inputs.
        return _cropped(conv.apply(y), (0,) * conv.dims, self.in_shape[1:])

    def absolute(self) -> "ConvTranspose":  # noqa: D102
        return replace(self, conv=self.conv.absolute())


def _cropped(x: Tensor, starts: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """A batch without what lies outside the window, on the last axes."""
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True), start=-len(sizes)):
        x = x.narrow(axis, start, size)
    return x
