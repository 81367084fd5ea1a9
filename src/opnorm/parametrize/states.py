"""State dicts of torch's two functions, of plain layers and of older states, read into a normalised layer."""

import warnings
from typing import Any

from torch import Tensor, nn

from opnorm.parametrize.chains import rule_of


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
    rule = rule_of(module, name)
    if rule is None:
        return
    empty = rule.get_extra_state()[:0]
    differing = rule.differing(state.setdefault(f"{own}_extra_state", empty))
    if differing:
        warnings.warn(f"{prefix}{name}: the checkpoint was normalised with {differing}", stacklevel=2)
    if rule.scale is not None:
        state.setdefault(f"{own}scale", rule.scale.detach().clone())
