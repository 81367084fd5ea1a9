"""Dividing by the norm: the only part of opnorm that touches parameters."""

from opnorm.parametrize.convert import convert
from opnorm.parametrize.coverage import Coverage, coverage
from opnorm.parametrize.fold import fold
from opnorm.parametrize.monitor import Monitor
from opnorm.parametrize.normalize import normalize
from opnorm.parametrize.projector import Projector
from opnorm.parametrize.register import remove_spectral_norm, spectral_norm
from opnorm.parametrize.renew import update

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
