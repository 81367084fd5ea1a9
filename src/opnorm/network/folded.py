"""A model as it is deployed: weights that are computed from others (parametrizations) as plain weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm

from opnorm.parametrize.chains import normalised
from opnorm.parametrize.register import remove_spectral_norm as remove_opnorm


def folded(model: nn.Module) -> nn.Module:
    """A copy whose parametrized weights are plain ones with the values of evaluation; the model itself if none are.

    Covers `opnorm.spectral_norm`, every `torch.nn.utils.parametrize` parametrization and torch's older hook of
    spectral normalisation. The model is left untouched.
    """
    if not is_parametrized(model):
        return model
    # A weight that a hook computed belongs to a graph, and such a tensor refuses to be copied.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    plain = copy.deepcopy(model, memo)
    with torch.no_grad():
        for _, module, name, _ in normalised(plain):
            remove_opnorm(module, name)
        for module in plain.modules():
            _fold_one(module)
    return plain


def is_parametrized(model: nn.Module) -> bool:
    """Whether a weight of the model is computed from others."""
    return any(parametrize.is_parametrized(m) or _hooks(m) for m in model.modules())


def _fold_one(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        chains = module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        # A deep copy shares the class that holds its weights' properties, and removing one deletes it there.
        kind = type(module)
        own = {key: value for key, value in vars(kind).items() if key not in {"__dict__", "__weakref__"}}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
        chains.eval()  # reading a weight must not advance a power iteration
        for name in list(chains):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for hook in _hooks(module):
        remove_spectral_norm(module, hook.name)


def _hooks(module: nn.Module) -> list[SpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
