"""Normalisation layers: with stored statistics a scale for each channel, otherwise not linear."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from opnorm import _rounding as rounding
from opnorm.errors import InputShapeError, NotLinearError, WeightError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.weights import check_weight, read_weight
from opnorm.operators import Diagonal, LinearOperator


@register_layer(nn.BatchNorm1d)
@register_layer(nn.BatchNorm2d)
@register_layer(nn.BatchNorm3d)
@register_layer(nn.SyncBatchNorm)
@register_layer(nn.InstanceNorm1d)
@register_layer(nn.InstanceNorm2d)
@register_layer(nn.InstanceNorm3d)
def stored_statistics(module: _BatchNorm | _InstanceNorm, input_shape: Shape | None) -> Diagonal:
    """Return the scale `weight / sqrt(running_var + eps)` of evaluation mode.

    Raises:
        NotLinearError: in training mode and without stored statistics: it divides by the input's own deviation.
        InputShapeError: if `input_shape` does not fit.
        WeightError: if a statistic is negative or not finite.
    """
    name = type(module).__name__
    if module.training:
        raise NotLinearError(f"{name} divides by the batch's own deviation in training mode; call .eval() on it first")
    variance = module.running_var
    # Batch norms use their statistics where they exist, instance norms only while they track them.
    if variance is None or (isinstance(module, _InstanceNorm) and not module.track_running_stats):
        raise NotLinearError(f"{name} has no stored statistics and divides by the input's own deviation")
    channels = variance.shape[0]
    if input_shape is not None and (not input_shape or input_shape[0] != channels):
        raise InputShapeError(f"{name} takes input_shape=({channels}, ...) without the batch, got {input_shape}")
    scale = _scale(name, module, variance.detach())
    return Diagonal(scale, None if input_shape is None else input_shape[1:], rounding.gamma(3))


def _scale(name: str, module: _BatchNorm | _InstanceNorm, variance: Tensor) -> Tensor:
    """Sum, root and quotient in float64: three roundings, and none of them doubles an error."""
    spread = check_weight(variance, f"{name}: running_var").double() + module.eps
    if not bool((spread > 0).all()):
        raise WeightError(f"{name}: running_var + eps is not positive, so the layer divides by zero or by NaN")
    affine = getattr(module, "weight", None) is not None
    gain = read_weight(module).double() if affine else torch.ones_like(spread)
    scale = gain / spread.sqrt()
    if bool(((scale.abs() < rounding.TINY) & (gain != 0)).any()):
        raise WeightError(f"{name}: weight / sqrt(running_var + eps) is too small for float64; scale the weight up")
    return check_weight(scale, f"{name}: weight / sqrt(running_var + eps)")


@register_layer(nn.LayerNorm)
@register_layer(nn.RMSNorm)
@register_layer(nn.GroupNorm)
@register_layer(nn.LocalResponseNorm)
def own_statistics(module: nn.Module, input_shape: Shape | None) -> LinearOperator:
    """Refuse: the layer divides by a number that depends on the input.

    Raises:
        NotLinearError: always.
    """
    raise NotLinearError(
        f"{type(module).__name__} divides by a number that depends on its input, so it is not linear and has no "
        "operator norm; it can only have a Lipschitz bound"
    )
