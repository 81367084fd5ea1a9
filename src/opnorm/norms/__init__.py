"""Operator -> Enclosure, one algorithm a file."""

from opnorm.norms.dense import dense_norm

__all__ = ["dense_norm"]
