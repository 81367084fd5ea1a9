"""Divide by the spectral norm, and mean it.

The public names. Each is resolved on first use (PEP 562), so that importing opnorm, or asking the command line for
help, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opnorm import errors, layers, norms, operators
    from opnorm._enclosure import Enclosure
    from opnorm.norms import norm
    from opnorm.parametrize import fold, remove_spectral_norm, spectral_norm, update

__version__ = "0.1.0"

_HOME = {
    "Enclosure": "opnorm._enclosure",
    "fold": "opnorm.parametrize",
    "norm": "opnorm.norms",
    "remove_spectral_norm": "opnorm.parametrize",
    "spectral_norm": "opnorm.parametrize",
    "update": "opnorm.parametrize",
}
_MODULES = frozenset({"errors", "layers", "norms", "operators"})

__all__ = ["Enclosure", "errors", "fold", "layers", "norm", "norms", "operators", "remove_spectral_norm", "spectral_norm", "update"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the type of a lazily resolved name is declared above
    if name in _MODULES:
        return import_module(f"opnorm.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'opnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
