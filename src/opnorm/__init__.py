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
    from opnorm.network import LipschitzPenalty, NetworkBound, lipschitz
    from opnorm.norms import norm
    from opnorm.parametrize import (
        Coverage,
        Monitor,
        Projector,
        convert,
        coverage,
        fold,
        normalize,
        remove_spectral_norm,
        spectral_norm,
        update,
    )
    from opnorm.rewrite import normalize_checkpoint, verify


_HOME = {
    "Coverage": "opnorm.parametrize",
    "Enclosure": "opnorm._enclosure",
    "LipschitzPenalty": "opnorm.network",
    "Monitor": "opnorm.parametrize",
    "NetworkBound": "opnorm.network",
    "Projector": "opnorm.parametrize",
    "Report": "opnorm.auditing",
    "audit": "opnorm.auditing",
    "convert": "opnorm.parametrize",
    "coverage": "opnorm.parametrize",
    "fold": "opnorm.parametrize",
    "lipschitz": "opnorm.network",
    "norm": "opnorm.norms",
    "normalize": "opnorm.parametrize",
    "normalize_checkpoint": "opnorm.rewrite",
    "remove_spectral_norm": "opnorm.parametrize",
    "spectral_norm": "opnorm.parametrize",
    "update": "opnorm.parametrize",
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
    "Coverage",
    "Enclosure",
    "LipschitzPenalty",
    "Monitor",
    "NetworkBound",
    "Projector",
    "Report",
    "audit",
    "checkpoint",
    "convert",
    "coverage",
    "errors",
    "fold",
    "layers",
    "lipschitz",
    "network",
    "norm",
    "normalize",
    "normalize_checkpoint",
    "norms",
    "operators",
    "remove_spectral_norm",
    "spectral_norm",
    "testing",
    "update",
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
