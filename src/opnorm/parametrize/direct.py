"""Layers that meet the raw weight in training: what is divided is their product, and the weight is never computed."""

import torch
from torch import Tensor

from opnorm.parametrize.convolved import Geometry, ScaledConv
from opnorm.parametrize.divided import division
from opnorm.parametrize.division import ScaledLinear
from opnorm.parametrize.on_device import autocasting
from opnorm.parametrize.rule import Rule
from opnorm.parametrize.values import compute_dtype


def linear(rule: Rule, x: object, raw: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return `F.linear(x, layer.weight, bias)`, or None where the weight has to be computed first."""
    view = rule.view
    if not _meets(rule, x, raw) or view.frequencies or view.sampled or view.blocks > 1 or raw.ndim != 2:
        return None
    assert isinstance(x, Tensor)
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = ScaledLinear.apply(flat, raw, bias, rule.triple(raw), rule.lipschitz, rule.mode == "clip")  # type: ignore[no-untyped-call]
    return out.reshape(*x.shape[:-1], len(raw))


def convolution(rule: Rule, x: object, raw: Tensor, bias: Tensor | None, shape: Geometry | None) -> Tensor | None:
    """Return a convolution by `layer.weight`, or None where the weight has to be computed first."""
    if shape is None or not rule.view.joint or not _meets(rule, x, raw):
        return None
    assert isinstance(x, Tensor)
    if x.ndim != raw.ndim:
        return None
    out: Tensor = ScaledConv.apply(x, raw, bias, division(rule, rule.triple(raw)), shape)  # type: ignore[no-untyped-call]
    return out


def _meets(rule: Rule, x: object, raw: Tensor) -> bool:
    """Whether an input can meet the raw weight: in full precision, and outside transforms."""
    if rule.scale is not None or rule.view.axis:
        return False
    if not isinstance(x, Tensor) or x.dtype != raw.dtype or raw.dtype != compute_dtype(raw):
        return False
    return not (raw.is_complex() or autocasting(raw) or torch._C._are_functorch_transforms_active())
