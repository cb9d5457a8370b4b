"""What commands print: results on stdout, as a table or JSON; everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hierarchy_builder.files import write_bytes

stdout, stderr = Console(), Console(stderr=True)


def print_result(content: Any, as_json: bool, title: str = "", note: str = "") -> None:
    """Print rows (a list of mappings of equal names) or one mapping; NaN is null in JSON.

    title, note: lines above a table, such as what its numbers are measured against; JSON goes without.
    """
    if not as_json:
        _print_heading(title, note)
    if as_json:
        sys.stdout.write(json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n")
    elif isinstance(content, list):
        table = Table()
        for name in content[0] if content else ():
            table.add_column(name, overflow="fold")  # a narrow terminal breaks a number, and hides none of it
        for row in content:
            table.add_row(*(_text(value) for value in row.values()))
        stdout.print(table)
    else:
        table = Table("name", "value")
        for name, value in flattened(content).items():
            table.add_row(name, _text(value))
        stdout.print(table)


def _print_heading(title: str, note: str) -> None:
    # lines of their own: rich breaks the title of a table at the width of the table
    for text, style in ((title, "bold"), (note, "dim")):
        if text:
            stdout.print(text, style=style, markup=False, highlight=False)


def write_json(path: Path, content: Any) -> None:
    """Write plain data to a file that is whole or absent; its folder is made, NaN is null."""
    text = json.dumps(without_nan(content), indent=1, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def without_nan(content: Any) -> Any:
    """Plain data with None for NaN, which JSON has no word for."""
    if isinstance(content, float):
        return None if math.isnan(content) else content
    if isinstance(content, Mapping):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return content


def flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings inside become dotted names, one level deep."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
