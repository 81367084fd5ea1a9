"""Live models that use torch's spectral norm become opnorm's."""

from collections.abc import Iterator
from typing import TypeVar

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from opnorm.errors import ArgumentError
from opnorm.norms.casting import Mode
from opnorm.parametrize.chains import chain_of
from opnorm.parametrize.families import Norm
from opnorm.parametrize.register import detach_parametrization, spectral_norm

ModelT = TypeVar("ModelT", bound=nn.Module)


def convert(model: ModelT, *, norm: Norm = "reshaped", lipschitz: float = 1.0, mode: Mode = "divide") -> ModelT:
    """Turn every weight that torch's `spectral_norm` normalises, in either form, into opnorm's.

    The raw parameters stay the same objects, so that an optimizer keeps them; torch's u and v are dropped.

    Args:
        model: changed in place.
        norm: "reshaped" keeps the function: torch divides by the norm of the reshaped kernel, and so does this,
            but by its proved value instead of by an estimate from below. "operator" divides by the true norm.
        lipschitz: K.
        mode: "divide" or "clip".

    Returns:
        The same model.

    Raises:
        ArgumentError: if nothing in the model uses torch's `spectral_norm`, or a weight has other parametrizations too.
        InputShapeError: with norm="operator", for a layer whose norm depends on its input's size.

    Example:
        >>> import torch, opnorm
        >>> layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4))
        >>> opnorm.convert(layer).parametrizations.weight[0].norm
        'reshaped'
    """
    found = list(_torch_normalised(model))
    if not found:
        raise ArgumentError(
            f"nothing in this {type(model).__name__} uses torch's spectral_norm; opnorm.normalize(model) normalises a "
            "plain model"
        )
    for module, name, rule in found:
        if isinstance(rule, SpectralNorm):
            _remove_hook(module, name, rule)
        else:
            if len(chain_of(module, name)) > 1:
                raise ArgumentError(
                    f"{type(module).__name__}.{name} has other parametrizations too; remove those first"
                )
            detach_parametrization(module, name)
        dim = rule.dim if norm == "reshaped" else None
        spectral_norm(module, name, rule.n_power_iterations, dim=dim, lipschitz=lipschitz, mode=mode, norm=norm)
    return model


def _torch_normalised(model: nn.Module) -> Iterator[tuple[nn.Module, str, SpectralNorm | _SpectralNorm]]:
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, SpectralNorm):
                yield module, hook.name, hook
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            for rule in chain:
                if isinstance(rule, _SpectralNorm):
                    yield module, name, rule


def _remove_hook(module: nn.Module, name: str, hook: SpectralNorm) -> None:
    """Take torch's hook off, and give the raw parameter its own name back."""
    raw = module._parameters[f"{name}_orig"]
    nn.utils.remove_spectral_norm(module, name)
    module._parameters[name] = raw
