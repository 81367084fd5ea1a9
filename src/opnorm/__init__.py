"""Divide by the spectral norm, and mean it.

The public names. Each is resolved on first use (PEP 562), so that importing opnorm, or asking the command line for
help, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opnorm import errors, layers, network, norms, operators
    from opnorm._enclosure import Enclosure
    from opnorm.network import NetworkBound, lipschitz
    from opnorm.norms import norm

__version__ = "0.1.0"

_HOME = {
    "Enclosure": "opnorm._enclosure",
    "NetworkBound": "opnorm.network",
    "lipschitz": "opnorm.network",
    "norm": "opnorm.norms",
}
_MODULES = frozenset({"errors", "layers", "network", "norms", "operators"})

__all__ = ["Enclosure", "NetworkBound", "errors", "layers", "lipschitz", "network", "norm", "norms", "operators"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the type of a lazily resolved name is declared above
    if name in _MODULES:
        return import_module(f"opnorm.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'opnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
