"""A report as JSON, with a schema version. Numbers are exact; what is not finite is null."""

import json
import math
from typing import Any

from opnorm.auditing import Report, Row

SCHEMA = "opnorm.audit/1"
"""Changes when a field is removed or changes its meaning; added fields do not change it."""


def to_json(report: Report) -> str:
    """Return the report as indented JSON text."""
    return json.dumps(finite(as_dict(report)), indent=2, allow_nan=False) + "\n"


def as_dict(report: Report) -> dict[str, Any]:
    """Return the report as plain containers."""
    return {
        "schema": SCHEMA,
        "source": report.source,
        "format": report.format,
        "taken": report.taken,
        "guarantee": report.guarantee,
        "rtol": report.rtol,
        "elements": report.elements,
        "measured_elements": report.measured_elements,
        "skipped_elements": report.skipped_elements,
        "rows": [_row(row) for row in report.rows],
        "skipped": [
            {
                "name": item.name,
                "shape": list(item.shape),
                "dtype": item.dtype,
                "elements": item.elements,
                "share": item.share,
                "kind": item.kind,
                "reason": item.reason,
            }
            for item in report.skipped
        ],
        "rules": list(report.rules),
        "violations": [{"rule": v.rule, "name": v.name, "reason": v.reason} for v in report.violations],
        "ok": report.ok,
        "summary": report.summary,
        "seconds": report.seconds,
        "versions": report.versions,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "role": row.role,
        "elements": row.elements,
        "share": row.share,
        "lower": row.lower,
        "upper": row.upper,
        "gap": row.gap,
        "guarantee": row.enclosure.guarantee,
        "failure_probability": row.enclosure.failure_probability,
        "method": row.enclosure.method,
        "met": row.enclosure.met,
        "frobenius": row.frobenius,
        "stable_rank": row.stable_rank,
        "aliases": list(row.aliases),
        "note": row.note,
    }


def finite(value: Any) -> Any:
    """Return plain containers with None in the place of what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return value
