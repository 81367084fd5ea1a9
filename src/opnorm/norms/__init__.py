"""Operator -> Enclosure, one algorithm a file, and `select`, which says which would be used and why."""

from opnorm.norms.dispatch import measure, norm
from opnorm.norms.select import METHODS, Plan, select

__all__ = ["METHODS", "Plan", "measure", "norm", "select"]
