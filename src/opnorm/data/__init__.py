"""Data to try things on: the digits that the package carries."""

from opnorm.data.digits import Digits, digits

__all__ = ["Digits", "digits"]
