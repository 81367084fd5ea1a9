"""`conv(x, W / d) + b` in one step: no quotient larger than the output; the divisor's gradient subtracted in place."""

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from opnorm.parametrize.divided import Division
from opnorm.parametrize.division import (
    coefficient,
    composed,
    readable_divisor,
    subtract_direction_,
)

FUNCTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class Geometry(NamedTuple):
    """The arguments of a convolution besides its tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def geometry(dims: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Geometry | None:
    """Return the arguments of `F.conv2d` and its kin in full; None for a padding by name."""
    if isinstance(padding, str):
        return None
    return Geometry(_each(stride, dims), _each(padding, dims), _each(dilation, dims), groups)


def _each(value: Any, dims: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * dims if len(found) == 1 else found


class ScaledConv(Function):
    """Divides the weight or the output, whichever is smaller."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, division: Division, shape: Geometry
    ) -> Tensor:
        """Convolve x of shape (n, channels, ...)."""
        d = readable_divisor(division.triple.sigma, division.lipschitz, division.clip)
        pixels = len(x) * prod(x.shape[2:])  # about as many as the output has, times the strides
        for stride in shape.stride:
            pixels //= stride
        ctx.late = pixels * len(weight) < weight.numel()
        ctx.division, ctx.shape, ctx.has_bias, ctx.divisor = division, shape, bias is not None, d
        kernel = None if ctx.late else weight / d
        ctx.save_for_backward(x, weight, kernel)
        if kernel is not None:
            return _convolution(x, kernel, bias, shape)
        return _convolution(x, weight, None if bias is None else bias * d, shape).div_(d)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Autograd's gradients of the convolution, and the divisor's in place."""
        x, weight, kernel = ctx.saved_tensors
        division, shape, needs = ctx.division, ctx.shape, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return (*_again(x, weight, gradient, division, shape, needs), None, None)
        d: Tensor | float = ctx.divisor
        fed, kernel = (gradient / d, weight) if ctx.late else (gradient, kernel)
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            fed, x, kernel, [len(weight)], *shape[:3], False, [0] * len(shape.stride), shape.groups, needs
        )
        if needs[2] and ctx.late:
            grad_bias.mul_(d)
        if needs[1]:
            grad_weight = _with_direction(
                grad_weight.contiguous(), kernel, division, 1.0 if ctx.late else d, (x, grad_x)
            )
        return grad_x, grad_weight, grad_bias, None, None


def _with_direction(
    grad: Tensor, kernel: Tensor, division: Division, d: Tensor | float, images: tuple[Tensor, Tensor | None]
) -> Tensor:
    """`grad / d` less the divisor's share, in place: `<grad, kernel> / sigma` of the direction.

    The inner product is that of the input with its gradient too, which may be the smaller pair.
    """
    triple, matrices = division.triple, division.view.matrices(grad)
    x, grad_x = images
    a, b = (grad_x, x) if grad_x is not None and x.numel() < grad.numel() else (grad, kernel)
    along = torch.dot(a.flatten(), b.flatten())
    share = coefficient(triple.sigma, division.lipschitz, division.clip, along)
    subtract_direction_(matrices, triple, share, d)
    return grad


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Geometry) -> Tensor:
    stride, padding, dilation, groups = shape
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _again(
    x: Tensor, weight: Tensor, gradient: Tensor, division: Division, shape: Geometry, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients as differentiable functions of everything, for gradients of gradients."""
    view = division.view
    with torch.enable_grad():
        value = composed(view.matrices(weight), division.triple, division.lipschitz, division.clip)
        result = _convolution(x, view.weight(value, weight.shape), None, shape)
    wanted = [tensor for tensor, need in zip((x, weight), needs, strict=False) if need]
    found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=True) if wanted else ())
    grad_x = next(found) if needs[0] else None
    grad_weight = next(found) if needs[1] else None
    over = [axis for axis in range(gradient.ndim) if axis != 1]
    return grad_x, grad_weight, gradient.sum(over) if needs[2] else None
