"""Divide by the spectral norm, and mean it.

The public names. Each is resolved on first use (PEP 562), so that importing opnorm, or asking the command line for
help, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opnorm._version import __version__ as __version__

if TYPE_CHECKING:
    from opnorm import (
        checkpoint,
        errors,
        layers,
        network,
        norms,
        operators,
        testing,
    )
    from opnorm._enclosure import Enclosure
    from opnorm.auditing import Report, audit
    from opnorm.network import NetworkBound, lipschitz
    from opnorm.norms import norm
    from opnorm.rewrite import normalize_checkpoint, verify


_HOME = {
    "Enclosure": "opnorm._enclosure",
    "NetworkBound": "opnorm.network",
    "Report": "opnorm.auditing",
    "audit": "opnorm.auditing",
    "lipschitz": "opnorm.network",
    "norm": "opnorm.norms",
    "normalize_checkpoint": "opnorm.rewrite",
    "verify": "opnorm.rewrite",
}
_MODULES = frozenset(
    {
        "checkpoint",
        "errors",
        "layers",
        "network",
        "norms",
        "operators",
        "testing",
    }
)

__all__ = [
    "Enclosure",
    "NetworkBound",
    "Report",
    "audit",
    "checkpoint",
    "errors",
    "layers",
    "lipschitz",
    "network",
    "norm",
    "normalize_checkpoint",
    "norms",
    "operators",
    "testing",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"opnorm.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'opnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
