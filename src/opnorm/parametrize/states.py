"""State dicts of torch's two functions, of plain layers and of older states, read into a normalised layer."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from opnorm.parametrize.chains import rule_of
from opnorm.parametrize.sharding import gathered
from opnorm.parametrize.spectral import SCALE_START, SpectralNormalization


def adopt_state(
    name: str,
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    *_: Any,
) -> None:
    """Rename the keys of one weight in place, before the layer loads them.

    Understood are `weight` (plain), `weight_orig` with `weight_u` and `weight_v` (torch's hook), and
    `parametrizations.weight.original` with `_u` and `_v` (torch's parametrization); u and v are dropped, as nothing
    of opnorm depends on them.
    """
    rule = rule_of(module, name)
    if rule is None:  # taken off by torch's `remove_parametrizations`, which knows nothing of this
        return
    original, own = f"{prefix}parametrizations.{name}.original", f"{prefix}parametrizations.{name}.0."
    hooked = f"{prefix}{name}_orig"
    if hooked in state:
        state[original] = state.pop(hooked)
        for leftover in (f"{prefix}{name}", f"{prefix}{name}_u", f"{prefix}{name}_v"):
            state.pop(leftover, None)
    elif f"{prefix}{name}" in state:
        state[original] = state.pop(f"{prefix}{name}")
    for leftover in (f"{own}_u", f"{own}_v"):
        state.pop(leftover, None)
    if original not in state:
        return
    extra = state.setdefault(f"{own}_extra_state", rule.get_extra_state()[:0])
    differing = rule.differing(extra)
    if differing:
        warnings.warn(f"{prefix}{name}: the checkpoint was normalised with {differing}", stacklevel=2)
    _adopt_scale(rule, state, f"{own}scale", f"{prefix}{name}")


def _adopt_scale(rule: SpectralNormalization, state: dict[str, Tensor], key: str, label: str) -> None:
    """Fill in a learned scale that the checkpoint does not have, and say where one has no place in the layer."""
    if rule.scale is not None and key not in state:
        own = torch.full((1,), SCALE_START) if rule.scale.is_meta else rule.scale.detach().clone()
        state[key] = own
        if state[key.removesuffix("scale") + "_extra_state"].numel():  # of an opnorm layer, so that it was used without
            share = float(torch.sigmoid(gathered(own)))
            warnings.warn(
                f"{label}: the checkpoint has no learned scale; this layer's own stays, {share:.4g} K", stacklevel=3
            )
    elif rule.scale is None and key in state:  # torch raises, or where strict=False leaves it out
        share = float(torch.sigmoid(state[key]))
        warnings.warn(
            f"{label}: the checkpoint has a learned scale, {share:.4g} K, which this layer has not; make it with "
            "learn_scale=True, or load opnorm.fold(trained model).state_dict() into a plain model",
            stacklevel=3,
        )
