"""A report -> a table for the terminal, JSON for machines, one HTML file for people. Nothing is computed here."""

from opnorm.render.html import to_html
from opnorm.render.json import SCHEMA, to_json
from opnorm.render.table import print_table

__all__ = ["SCHEMA", "print_table", "to_html", "to_json"]
