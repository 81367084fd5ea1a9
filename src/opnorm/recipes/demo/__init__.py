"""The story of `opnorm demo`: a small network, trained plain and under two spectral norms, and what is true of it."""

from opnorm.recipes.demo.page import to_html
from opnorm.recipes.demo.story import Story, tell

__all__ = ["Story", "tell", "to_html"]
