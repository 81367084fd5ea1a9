"""Live models that use torch's spectral norm become opnorm's."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from opnorm.errors import ArgumentError
from opnorm.norms.casting import Mode
from opnorm.parametrize.chains import chain_of
from opnorm.parametrize.checks import Asked, check_options, checked_view, located
from opnorm.parametrize.families import Norm
from opnorm.parametrize.flow import Flow, run_once
from opnorm.parametrize.register import attach, detach_parametrization

ModelT = TypeVar("ModelT", bound=nn.Module)


def convert(
    model: ModelT,
    example_input: Any = None,
    *,
    norm: Norm = "reshaped",
    lipschitz: float = 1.0,
    mode: Mode = "divide",
) -> ModelT:
    """Turn every weight that torch's `spectral_norm` normalises, in either form, into opnorm's.

    The raw parameters stay the same objects, so that an optimizer keeps them; torch's u and v are dropped.

    Args:
        model: changed in place; not at all where a weight is refused.
        example_input: one batch, the tuple of the arguments, or a dict of the named ones, for norm="operator":
            convolutions are then normalised for the input sizes that they see in it; without it for every size.
        norm: "reshaped" keeps the function: torch divides by the norm of the reshaped kernel, and so does this,
            but by its proved value instead of by an estimate from below. "operator" divides by the true norm.
        lipschitz: K.
        mode: "divide" or "clip".

    Returns:
        The same model.

    Raises:
        ArgumentError: if nothing in the model uses torch's `spectral_norm`, or a weight has other parametrizations too.
        InputShapeError: with norm="operator", for a layer whose norm depends on its input's size, where that is not
            known.

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
    flow = Flow() if example_input is None or norm != "operator" else run_once(model, example_input)
    paths = {module: path for path, module in model.named_modules()}
    asked = [Asked(rule.n_power_iterations, _dim(rule, norm), lipschitz, mode, norm) for *_, rule in found]
    for options in asked:
        check_options(options)
    views = []
    for (module, name, _), options in zip(found, asked, strict=True):
        if parametrize.is_parametrized(module, name) and len(chain_of(module, name)) > 1:
            raise ArgumentError(
                f"{paths[module]}.{name}".lstrip(".") + " has other parametrizations too; remove those first"
            )
        with located(paths[module], sizes="or convert(model, example_input)", skip=False):
            views.append(checked_view(module, name, options, flow.shapes.get(module), replacing=True))
    for (module, name, rule), options, view in zip(found, asked, views, strict=True):
        if isinstance(rule, SpectralNorm):
            _remove_hook(module, name, rule)
        else:
            detach_parametrization(module, name)
        attach(module, name, options, view)
    return model


def _dim(rule: SpectralNorm | _SpectralNorm, norm: Norm) -> int | None:
    return rule.dim if norm == "reshaped" else None


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
    for number, wrapped in list(module._load_state_dict_pre_hooks.items()):  # torch 2.13 leaves its own behind
        inner = getattr(wrapped, "hook", wrapped)
        if isinstance(inner, SpectralNormLoadStateDictPreHook) and inner.fn.name == name:
            del module._load_state_dict_pre_hooks[number]
