"""The largest singular triple of a map that frequencies say little about, tracked on one sample.

For reflecting and replicating padding, and for small inputs, where the border is a large part of the norm.
"""

from dataclasses import replace

import torch
from torch import Tensor

from opnorm.operators import Conv, ConvTranspose, LinearOperator
from opnorm.parametrize.blocks import Block, Triple, krylov, normalised, random_like, ritz_rotation, scaled
from opnorm.parametrize.views import View, with_weight


def start(view: View, weight: Tensor, width: int) -> Block:
    """Return orthonormal samples that depend on nothing but the shape."""
    operator = view.template
    y = random_like(weight, (1, operator.in_size, min(width, operator.in_size, operator.out_size)), as_complex=False)
    return Block(torch.linalg.qr(y)[0], y.real[:, :0, 0], y[..., :0])


def step(view: View, weight: Tensor, block: Block, depth: int = 1) -> tuple[Block, Triple]:
    """Advance the samples in their Krylov space of that depth; the direction is the gradient of the gain, in full."""
    operator = with_weight(view.template, weight)
    left, pulled = krylov(
        lambda y: _columns(operator.apply(_samples(y, operator.in_shape))),
        lambda x: _columns(operator.adjoint(_samples(x, operator.out_shape))),
        block.y,
        depth,
    )
    pulled, scale = scaled(pulled)
    rotation = ritz_rotation(pulled)[..., : block.y.shape[-1]]
    y, lengths = normalised(pulled @ rotation)
    left = left @ rotation[..., :1]
    slope = _weight_gradient(
        operator, _samples(y[..., :1], operator.in_shape), _samples(left, operator.out_shape), weight
    )
    return Block(y, block.omega, block.scouts), Triple((lengths * scale)[:, 0, 0], view.matrices(slope), None)


def _samples(columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    return columns[0].mT.reshape(-1, *shape)


def _columns(samples: Tensor) -> Tensor:
    return samples.flatten(1).mT[None]


def _weight_gradient(operator: LinearOperator, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `<y, A x>` with respect to the weight of a convolution."""
    transposed = isinstance(operator, ConvTranspose)
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    assert isinstance(conv, Conv)
    padding = [left for left, _ in conv.padding] if transposed else [0] * conv.dims
    extra = list(operator.output_padding) if isinstance(operator, ConvTranspose) else [0] * conv.dims
    fed = x if transposed else replace(conv, weight=weight).pad(x)

    def product(y: Tensor, fed: Tensor) -> Tensor:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            y,
            fed,
            weight.real,
            None,
            conv.stride,
            padding,
            conv.dilation,
            transposed,
            extra,
            conv.groups,
            (False, True, False),
        )
        return found[1]

    if not weight.is_complex():
        return product(y, fed)
    # `y conj(x)`, written out: torch has no such gradient of complex tensors on the CPU.
    return torch.complex(
        product(y.real, fed.real) + product(y.imag, fed.imag), product(y.imag, fed.real) - product(y.real, fed.imag)
    )
