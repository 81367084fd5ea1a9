"""Dividing by the norm: the only part of opnorm that touches parameters."""

from opnorm.parametrize.fold import fold
from opnorm.parametrize.register import remove_spectral_norm, spectral_norm
from opnorm.parametrize.renew import update

__all__ = ["fold", "remove_spectral_norm", "spectral_norm", "update"]
