"""Griffe reads the section "Examples:"; the docstrings say "Example:", as most of them have one."""

import re
from typing import Any

import griffe

_HEADING = re.compile(r"^(\s*)Example:(?=\n\s+>>>)", re.MULTILINE)


class OneExample(griffe.Extension):
    """Let a single example be rendered as the code that it is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the heading before the docstring is parsed."""
        if obj.docstring:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)
