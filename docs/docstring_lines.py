"""Keep the lines of a docstring apart on the reference page.

The docstrings of this project name one parameter, result or error at the start of a line. Markdown would join these
lines into one paragraph; two spaces before a line break keep them apart.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

START = re.compile(r"\n(?=(?:[a-z_]+(?:, [a-z_]+)*: |Returns |Raises |Source: |Columns: ))")


class DocstringLines(griffe.Extension):
    """Puts a Markdown line break before each line that begins a new statement."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = START.sub("  \n", obj.docstring.value)
