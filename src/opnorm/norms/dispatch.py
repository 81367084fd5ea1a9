"""The public measurement: anything linear to an Enclosure."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure, Guarantee
from opnorm.certificate.posdef import require_ieee_arithmetic
from opnorm.errors import ArgumentError
from opnorm.layers import to_operator
from opnorm.layers.weights import check_weight
from opnorm.norms.banded import banded_norm
from opnorm.norms.dense import dense_norm
from opnorm.norms.fourier import torus_norm
from opnorm.norms.groups import norm_over_groups
from opnorm.norms.lp import L2, Order, lp_norm, parse_order
from opnorm.norms.materialised import materialised_lp_norm, materialised_norm
from opnorm.norms.probable import estimated_norm, probable_norm
from opnorm.norms.rescaled import rescaled
from opnorm.norms.row_sums import row_sum_norm
from opnorm.norms.select import DENSE_LIMIT, check_guarantee, select
from opnorm.norms.size_free import size_free_norm
from opnorm.norms.structured import structured_norm
from opnorm.operators import Composed, Conv, ConvTranspose, Dense, LinearOperator, Scaled

Method = Literal["auto", "dense", "torus", "size-free", "banded", "structured", "lanczos"]


def norm(
    x: Tensor | nn.Module | LinearOperator,
    *,
    input_shape: tuple[int, ...] | None = None,
    ord: float | tuple[float, float] = 2,
    rtol: float | None = None,
    guarantee: Guarantee = "proved",
    method: Method = "auto",
    failure_probability: float = 1e-12,
) -> Enclosure:
    """Enclose the operator norm of a matrix, a linear layer or an operator.

    `sup |A x|_q / |x|_p` over all x, of the linear part of the map: a bias does not matter.

    Args:
        x: a matrix of shape (m, n); a linear layer, in the geometry that it really has; or an operator.
        input_shape: the shape of one sample without the batch, such as (3, 32, 32). None: valid for every input size,
            where such a bound exists.
        ord: p, or (p_in, p_out); 1, 2 and inf are tight, other pairs with p_in <= p_out are interpolated.
        rtol: target for `upper / lower - 1`; 1e-6, or 1e-3 where the guarantee is "probable". A wider enclosure is
            returned where it cannot be met (`.met` is False), never a weaker guarantee.
        guarantee: "proved" holds for the stored weights in exact arithmetic, the rounding of our own computation
            included; "probable" holds except with `failure_probability`; "estimate" promises nothing of the upper end.
        method: "auto", or one of `opnorm.norms.METHODS`; `opnorm.norms.select` says what "auto" would do.
        failure_probability: for "probable", over a start drawn from the system's entropy.

    Returns:
        The enclosure. `float()` of it is the upper end, the only one that is safe to divide by.

    Raises:
        ArgumentError: if an argument has no meaning, such as a tensor that is no matrix.
        UnsupportedLayerError: if the layer has no rule, is not linear, or holds several matrices.
        InputShapeError: if the norm depends on the input size and `input_shape` is missing or does not fit.
        WeightError: if a weight holds NaN, infinite values or integers.
        TooLargeError: if what was asked for does not fit into memory.
        ArithmeticModeError: if the processor flushes subnormal numbers to zero.

    Source: Rump, *Verification of positive definiteness*, BIT 46 (2006), for the proofs; the guide "Norms" of the
    documentation derives the bounds of convolutions.

    Example:
        >>> import torch, opnorm
        >>> print(opnorm.norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]])))
        4.999... <= norm <= 5.000... (gap ..., proved, ...)
        >>> layer = torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        >>> opnorm.norm(layer, input_shape=(3, 32, 32)).met
        True
    """
    require_ieee_arithmetic()
    check_guarantee(guarantee)
    operator = as_operator(x, input_shape)
    order = parse_order(ord)
    tolerance = rtol if rtol is not None else 1e-3 if guarantee == "probable" else 1e-6
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ArgumentError(f"rtol={rtol!r}: the target for the gap is a positive number")
    if not 0 < failure_probability < 1:
        raise ArgumentError(f"failure_probability={failure_probability!r}: it lies between 0 and 1")
    if order != L2:
        return _other_norm(operator, order, tolerance, method)
    return measure(operator, tolerance, guarantee, method, failure_probability)


def as_operator(x: Tensor | nn.Module | LinearOperator, input_shape: tuple[int, ...] | None = None) -> LinearOperator:
    """Return the operator that a matrix, a layer or an operator stands for.

    Raises:
        ArgumentError: if it is none of these, or a tensor with another number of axes than two.
        WeightError: if it is a tensor without plain values: sparse, quantised or on the meta device.
    """
    if isinstance(x, nn.Module):
        return _on_float64(to_operator(x, input_shape))
    if isinstance(x, LinearOperator):
        return _on_float64(x)
    if not isinstance(x, Tensor):
        raise ArgumentError(f"norm takes a matrix, a linear layer or an operator, not {type(x).__name__}")
    if x.ndim != 2:
        raise ArgumentError(
            f"a tensor of shape {tuple(x.shape)} is no matrix: pass the layer itself (a convolution's norm is not that "
            "of its reshaped kernel), opnorm.operators.Conv(kernel, ...), or one slice at a time"
        )
    if x.layout != torch.strided or x.is_meta or x.is_quantized:
        check_weight(x, "the matrix")
    return _on_float64(Dense(x.detach()))


def measure(
    operator: LinearOperator,
    rtol: float,
    guarantee: Guarantee = "proved",
    method: str = "auto",
    failure_probability: float = 1e-12,
) -> Enclosure:
    """Enclose the spectral norm of an operator by the methods that `select` names, the best ends of all.

    Raises:
        ArgumentError: if the method does not fit.
    """
    shapes = _shapes(operator)
    if shapes is not None and 0 in shapes:
        return Enclosure(0.0, 0.0, "proved", "zero", rtol)
    plan = select(operator, rtol=rtol, guarantee=guarantee, method=method)
    best: Enclosure | None = None
    for name in plan.method.split("+"):
        found = _run(name, operator, rtol, guarantee, failure_probability)
        best = found if best is None else best.meet(found)
        if best.met:
            break
    assert best is not None, plan  # every plan names a method
    return best


def _run(
    name: str, operator: LinearOperator, rtol: float, guarantee: Guarantee, failure_probability: float
) -> Enclosure:
    match name, operator:
        case "lanczos", _:
            return _lanczos(operator, rtol, guarantee, failure_probability)
        case ("structured", _) | ("size-free", Scaled()):
            return _structured(operator, rtol, guarantee, failure_probability)
        case "torus", Conv() | ConvTranspose():
            return torus_norm(operator, rtol=rtol)
        case "size-free", Conv() | ConvTranspose():
            return size_free_norm(operator, rtol=rtol)
        case "banded", Conv() | ConvTranspose():
            return norm_over_groups(operator, lambda part: banded_norm(part, rtol=rtol))
        case "dense", Dense():
            return dense_norm(operator.weight, rtol=rtol)
        case "dense", Conv() | ConvTranspose():
            return norm_over_groups(operator, lambda part: materialised_norm(part, rtol=rtol))
        case _:
            return materialised_norm(operator, rtol=rtol)


def _lanczos(operator: LinearOperator, rtol: float, guarantee: Guarantee, failure_probability: float) -> Enclosure:
    """A search from a random start, on weights scaled to the order of one."""
    scaled, exponent = rescaled(operator)
    if guarantee == "estimate":
        found = estimated_norm(scaled, rtol=rtol)
    else:
        found = probable_norm(scaled, rtol=rtol, failure_probability=failure_probability)
    lower, upper = rounding.ldexp_down(found.lower, exponent), rounding.ldexp_up(found.upper, exponent)
    return replace(found, lower=lower, upper=upper)


def _structured(operator: LinearOperator, rtol: float, guarantee: Guarantee, failure_probability: float) -> Enclosure:
    """By structure; a small composition by its own matrix, because the product of its parts' norms is loose."""
    if isinstance(operator, Composed) and guarantee == "proved":
        shapes = [_shapes(part) for part in operator.parts]
        if all(shape is not None and max(shape) <= DENSE_LIMIT for shape in shapes):
            return materialised_norm(operator, rtol=rtol)
    return structured_norm(
        operator, lambda part: measure(part, rtol, guarantee, "auto", failure_probability), rtol=rtol
    )


def _shapes(operator: LinearOperator) -> tuple[int, int] | None:
    """Numbers of inputs and outputs, or None where the operator stands for every size."""
    try:
        return operator.in_size, operator.out_size
    except ArgumentError:
        return None


def _other_norm(operator: LinearOperator, order: Order, rtol: float, method: str) -> Enclosure:
    """Norms between other spaces than l2, on the operator's matrix."""
    if method != "auto":
        raise ArgumentError(f"method={method!r} is for ord=2; other orders have one method each")
    if isinstance(operator, Conv) and operator.spatial is None:
        return row_sum_norm(operator, order, rtol=rtol)
    if isinstance(operator, Dense):
        return lp_norm(operator.weight, order, rtol=rtol)
    return materialised_lp_norm(operator, order, rtol=rtol)


def _on_float64(operator: LinearOperator) -> LinearOperator:
    """The operator on a device that has float64: Apple's GPUs have none, and the proof needs it."""
    if operator.device.type != "mps":
        return operator
    match operator:
        case Dense() | Conv():
            return replace(operator, weight=operator.weight.cpu())
        case ConvTranspose():
            return replace(operator, conv=replace(operator.conv, weight=operator.conv.weight.cpu()))
        case _:
            raise ArgumentError(
                f"{operator.device} has no float64; move the {type(operator).__name__} to the CPU first"
            )
