"""Audits: a checkpoint or a model -> a report of pure data."""

from opnorm.auditing.report import Report, Row, Skipped, Violation
from opnorm.auditing.rules import Rule, parse
from opnorm.auditing.run import audit

__all__ = ["Report", "Row", "Rule", "Skipped", "Violation", "audit", "parse"]
