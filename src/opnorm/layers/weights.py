"""The weight that a module uses, read without changing the module, and checked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from opnorm.errors import WeightError

WEIGHT_HOOKS = (SpectralNorm, WeightNorm, BasePruningMethod)
"""torch's own forward pre-hooks that recompute a weight before every call and leave the input as it is."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def read_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the weight that `module` would use in evaluation mode, detached.

    A parametrized weight is computed with its parametrizations in evaluation mode, and the weight of torch's older
    hooks (`spectral_norm`, `weight_norm`, pruning) from its parts: the attribute keeps the value of the last call,
    which is stale after an optimizer step. No power iteration is advanced and no buffer is written. A sharded weight
    (DTensor) is gathered, which every rank must take part in.

    Raises:
        WeightError: if the weight is missing, holds NaN or infinite values, or is of a kind without a norm.
    """
    with torch.no_grad():
        value = _fresh(module, name)
        if value is None:
            raise WeightError(f"{_label(module)} has no tensor {name!r}; set it before measuring the layer")
        gathered = value.full_tensor() if hasattr(value, "full_tensor") else value
    return check_weight(gathered.detach(), f"{_label(module)}: {name}")


def check_weight(weight: Tensor, name: str) -> Tensor:
    """Return `weight` if a norm is defined for it.

    Raises:
        WeightError: if it is quantised, sparse, without values, of an integer dtype, or holds NaN or infinite values.
    """
    if weight.is_quantized:
        raise WeightError(f"{name} is quantised; measure weight.dequantize() as a matrix, or the layer before it")
    if weight.layout != torch.strided:
        raise WeightError(f"{name} has the layout {weight.layout}; measure weight.to_dense()")
    if weight.is_meta:
        raise WeightError(f"{name} is on the meta device and has no values; load the weights first")
    if weight.dtype not in _DTYPES:
        raise WeightError(f"{name} has the dtype {weight.dtype}; convert it to a floating-point or complex dtype")
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(f"{name} holds NaN or infinite values, so the layer has no norm; repair the weights first")
    return weight


def _fresh(module: nn.Module, name: str) -> Tensor | None:
    if parametrize.is_parametrized(module, name):
        chain: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
        with _evaluating(chain):
            value: Tensor = chain()
        return value
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(module, do_power_iteration=False)
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(module)  # type: ignore[no-any-return]
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(module)  # type: ignore[no-any-return, no-untyped-call]
    return getattr(module, name, None)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode and put every part of it back as it was."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in before:
            part.training = training


def _label(module: nn.Module) -> str:
    return type(module).__name__
