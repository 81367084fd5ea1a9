"""Dividing by the norm: the only part of opnorm that touches parameters."""

from opnorm.parametrize.conversion import convert
from opnorm.parametrize.covered import Coverage, coverage
from opnorm.parametrize.folding import fold
from opnorm.parametrize.monitor import Monitor
from opnorm.parametrize.projector import Projector
from opnorm.parametrize.register import remove_spectral_norm, spectral_norm
from opnorm.parametrize.renew import update
from opnorm.parametrize.whole_model import normalize

__all__ = [
    "Coverage",
    "Monitor",
    "Projector",
    "convert",
    "coverage",
    "fold",
    "normalize",
    "remove_spectral_norm",
    "spectral_norm",
    "update",
]
