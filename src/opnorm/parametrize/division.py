"""`W -> W / d(W)` with the gradient through the divisor, in as few passes over the weight as it takes.

With d = sigma / K and the singular triple as a direction G, `d sigma / dW = G`, so the gradient is
`g / d - <g, W / d> / sigma * G`: one inner product and one low-rank update.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from opnorm.parametrize.blocks import Triple
from opnorm.parametrize.on_device import autocasting, host_waits, without_autocast


def inner(triple: Triple, matrices: Tensor) -> Tensor:
    """Return `<G, W>`, in the shape of sigma: the gain that the triple sees, differentiable in the weight."""
    along = matrices if triple.right is None else matrices @ triple.right
    # As real numbers: the gain is real, and for a complex weight so is the derivative.
    return shared((triple.left.conj() * along).sum((1, 2)).real, triple.sigma)


def shared(values: Tensor, sigma: Tensor) -> Tensor:
    """Return the values of all blocks, summed where one sigma divides them all."""
    return values if len(sigma) == len(values) else values.sum(0, keepdim=True)


def composed(matrices: Tensor, triple: Triple, lipschitz: Tensor | float, clip: bool) -> Tensor:
    """Return `W / d` out of differentiable operations, for every order of derivative and every transform.

    A weight of 16 bits is divided in the dtype of the estimate: its norm may be no number of its own dtype.
    """
    wide = matrices.to(triple.left.dtype)
    return (wide / divisor(_gain(triple, wide), lipschitz, clip)[:, None, None]).to(matrices.dtype)


def _gain(triple: Triple, matrices: Tensor) -> Tensor:
    """`inner` in full precision, also where products are cast to 16 bits around it."""
    if not autocasting(matrices):
        return inner(triple, matrices)
    # The compiled backward is cast all the same: its numbers must not depend on the size of the weight.
    unit = torch.where(triple.sigma > 0, triple.sigma, torch.ones_like(triple.sigma))
    with without_autocast(matrices):
        return inner(triple, matrices / unit[:, None, None]) * unit


def times(weight: Tensor, factor: Tensor) -> Tensor:
    """Return the product with a number that may be none of the weight's own dtype, in that dtype."""
    wide = torch.promote_types(weight.dtype, factor.dtype)
    return (weight.to(wide) * factor.to(wide)).to(weight.dtype)


def divisor(sigma: Tensor, lipschitz: Tensor | float, clip: bool) -> Tensor:
    """Return `sigma / K`, at least 1 where only larger weights are divided; 1 for a zero weight, which stays zero."""
    ratio = sigma / lipschitz
    if clip:
        return ratio.clamp_min(1.0)
    return torch.where(ratio > 0, ratio, torch.ones_like(ratio))


class Divide(Function):
    """`W / d` for a real weight, or a stored value of it, with the gradient above; computed in the dtype of sigma."""

    @staticmethod
    def forward(
        ctx: Any,
        matrices: Tensor,
        triple: Triple,
        lipschitz: float,
        clip: bool,
        stored: Tensor | None,
    ) -> Tensor:
        """Divide, or hand out `stored`."""
        ctx.triple, ctx.lipschitz, ctx.clip = triple, lipschitz, clip
        ctx.save_for_backward(matrices)
        if stored is not None:
            return stored.view_as(stored)
        return (matrices / divisor(triple.sigma, lipschitz, clip)[:, None, None]).to(matrices.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One inner product and one low-rank update; for higher derivatives, autograd through the definition."""
        (matrices,) = ctx.saved_tensors
        triple, lipschitz, clip = ctx.triple, ctx.lipschitz, ctx.clip
        if torch.is_grad_enabled():
            with torch.enable_grad():
                value = composed(matrices, triple, lipschitz, clip)
            return *torch.autograd.grad(value, matrices, gradient, create_graph=True), None, None, None, None
        result = gradient / divisor(triple.sigma, lipschitz, clip)[:, None, None]
        wide = matrices.to(result.dtype)
        along = shared(torch.linalg.vecdot(result.flatten(1), wide.flatten(1)), triple.sigma)
        weights = coefficient(triple.sigma, lipschitz, clip, along)
        return subtract_direction_(result, triple, weights).to(gradient.dtype), None, None, None, None


def coefficient(sigma: Tensor, lipschitz: float, clip: bool, along: Tensor) -> Tensor | float:
    """`along / sigma` where the divisor moves with sigma, and 0 where it does not: zero or unclipped weights."""
    least = lipschitz if clip else 0.0
    if len(sigma) == 1 and not host_waits(sigma):  # one number is read in less time than it takes to choose
        gain = float(sigma)
        return float(along) / gain if gain > least else 0.0
    along, active = along.to(sigma.dtype), sigma > least
    return torch.where(active, along / torch.where(active, sigma, torch.ones_like(sigma)), torch.zeros_like(sigma))


def subtract_direction_(result: Tensor, triple: Triple, weights: Tensor | float, d: Tensor | float = 1.0) -> Tensor:
    """Divide each block by d and subtract `weights * G`, in place."""
    if triple.right is not None and len(result) == 1 and isinstance(d, float) and not host_waits(result):
        # Rank by rank with numbers, the first as it divides: on the CPU faster than a product over one or two.
        matrix, kept, weight = result.squeeze(0), 1 / d, -float(weights)
        columns, rows = (part.to(result.dtype).squeeze(0).unbind(1) for part in (triple.left, triple.right))
        for column, row in zip(columns, rows, strict=True):
            matrix.addr_(column, row, beta=kept, alpha=weight)
            kept = 1.0
        return result
    if isinstance(d, Tensor) or d != 1:
        result.div_(d)
    each = weights if isinstance(weights, float) else weights.to(result.dtype)[:, None, None]
    left = triple.left.to(result.dtype) * -each
    if triple.right is None:
        return result.add_(left)
    right = triple.right.to(result.dtype).mT
    if len(result) == 1:
        result[0].addmm_(left[0], right[0])
        return result
    return result.baddbmm_(left, right)


class ScaledLinear(Function):
    """`x (W / d)^T + b` without ever writing `W / d`: what is divided is the product, as it is formed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        triple: Triple,
        lipschitz: float,
        clip: bool,
    ) -> Tensor:
        """Apply to x of shape (n, columns)."""
        ctx.triple, ctx.lipschitz, ctx.clip, ctx.has_bias = triple, lipschitz, clip, bias is not None
        ctx.divisor = readable_divisor(triple.sigma, lipschitz, clip)
        ctx.save_for_backward(x, weight)
        return quotient(x, weight.mT, ctx.divisor, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The divisor's share of the weight's gradient is written first, and the batch is added to it."""
        x, weight = ctx.saved_tensors
        triple, lipschitz, clip, d = ctx.triple, ctx.lipschitz, ctx.clip, ctx.divisor
        needs = ctx.needs_input_grad
        none = (None, None, None)
        if torch.is_grad_enabled():
            return (*_again(x, weight, gradient, triple, lipschitz, clip, needs), *none)
        grad_x = grad_weight = None
        grad_bias = gradient.sum(0) if ctx.has_bias and needs[2] else None
        if needs[0]:
            grad_x = quotient(gradient, weight, d)
        if needs[1] and grad_x is not None and triple.right is not None:
            along = torch.dot(grad_x.flatten(), x.flatten())
            left = triple.left[0] * -coefficient(triple.sigma, lipschitz, clip, along)
            grad_weight = quotient(gradient.mT, x, d, onto=left @ triple.right[0].mT)
        elif needs[1]:
            grad_weight = quotient(gradient.mT, x, d)
            along = torch.dot(grad_weight.flatten(), weight.flatten())
            subtract_direction_(grad_weight[None], triple, coefficient(triple.sigma, lipschitz, clip, along))
        return grad_x, grad_weight, grad_bias, *none


def readable_divisor(sigma: Tensor, lipschitz: float, clip: bool) -> Tensor | float:
    """Return the divisor of one block, as a number where reading it does not make an accelerator wait.

    And where a product of ordinary numbers may be divided after it is formed, as it neither over- nor underflows.
    """
    if host_waits(sigma):
        return divisor(sigma, lipschitz, clip)
    ratio = float(sigma) / lipschitz
    if clip:
        ratio = max(ratio, 1.0)
    return ratio if 1e-12 < ratio < 1e12 else divisor(sigma, lipschitz, clip)


def quotient(a: Tensor, b: Tensor, d: Tensor | float, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """Return `a b / d`, added to `bias`, or in place to `onto`.

    A product can divide by a number as it is formed. Otherwise both are divided by the root of d, or the first and
    the product, so that nothing overflows for very small or large weights.
    """
    if isinstance(d, float):
        if onto is not None:
            return onto.addmm_(a, b, alpha=1 / d)
        return torch.addmm(b.new_empty(1) if bias is None else bias, a, b, beta=int(bias is not None), alpha=1 / d)
    root = d.sqrt()
    if onto is not None:
        return onto.addmm_(a / root, b / root)
    result = torch.mm(a / root, b).div_(root)
    return result if bias is None else result.add_(bias)


def _again(
    x: Tensor, weight: Tensor, gradient: Tensor, triple: Triple, lipschitz: float, clip: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients as differentiable functions of everything, for gradients of gradients."""
    with torch.enable_grad():
        value = torch.nn.functional.linear(x, composed(weight[None], triple, lipschitz, clip)[0])
    wanted = [tensor for tensor, need in zip((x, weight), needs, strict=False) if need]
    found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=True) if wanted else ())
    grad_x = next(found) if needs[0] else None
    grad_weight = next(found) if needs[1] else None
    return grad_x, grad_weight, gradient.sum(0) if needs[2] else None
