"""A report or a network's bound -> a table, JSON for machines, one HTML file for people. Nothing is computed here."""

from opnorm.render.html import to_html
from opnorm.render.json import SCHEMA, to_json
from opnorm.render.network import bound_html, bound_json
from opnorm.render.table import print_table

__all__ = ["SCHEMA", "bound_html", "bound_json", "print_table", "to_html", "to_json"]
