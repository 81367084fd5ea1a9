"""Which weights of a model are to be normalised, which are to be skipped, and which nobody has thought of."""

from collections.abc import Iterable
from fnmatch import fnmatch

from torch import nn

from opnorm.errors import ArgumentError
from opnorm.parametrize.chains import rule_of
from opnorm.parametrize.covered import unknown
from opnorm.parametrize.families import weights_of

_NAMED = 5
"""Parameters that a warning names."""


def matching(path: str, patterns: Iterable[str]) -> set[str]:
    """Return which of the patterns stand for a name or for something above it."""
    return {pattern for pattern in patterns if fnmatch(path, pattern) or fnmatch(path, f"{pattern}.*")}


def to_normalise(model: nn.Module, skip: list[str]) -> tuple[list[tuple[nn.Module, str]], dict[str, str]]:
    """Return the weights of all layers but those to skip, each once; and what stays as it is although nobody asked.

    Raises:
        ArgumentError: if a name in `skip` matches nothing.
    """
    unused = set(skip)
    found: dict[tuple[int, str], tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for owner, name in weights_of(module):
            skipped_by = matching(path, skip)
            unused -= skipped_by
            if not skipped_by and rule_of(owner, name) is None:
                found.setdefault((id(owner), name), (owner, name))
    left = unknown(model)
    for name in list(left):
        skipped_by = matching(name, skip)
        unused -= skipped_by
        if skipped_by:
            del left[name]
    if unused:
        raise ArgumentError(
            f"skip={sorted(unused)} matches no linear layer; the names are those of model.named_modules()"
        )
    return list(found.values()), left


def left_message(left: dict[str, str]) -> str:
    """Say what stays as it is, why, and what to do."""
    named = [f"{name} ({reason})" for name, reason in left.items()][:_NAMED]
    more = f" and {len(left) - _NAMED} more, which opnorm.coverage lists" if len(left) > _NAMED else ""
    return (
        f"not normalised: {', '.join(named)}{more}; put the names in skip to leave them out without this warning, or "
        "divide by the norm of the matrix with opnorm.spectral_norm(layer, name, norm='reshaped')"
    )
