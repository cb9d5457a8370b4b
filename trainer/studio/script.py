"""What studio.js is told, which runs in the browser itself: tooltips, keys, and a warning before work is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

KEYS = {
    "g": "generate",
    "t": "take",
    "a": "apply",
    "r": "resume",
    "u": "undo",
    "y": "redo",
    "Escape": "stop",
}
"""Key → the button that it presses, by its id; not while a text is typed."""
KEYS_TEXT = (
    "**g** generate · **t** take mean · **a** apply features · **r** resume · **u** undo · **y** redo · **Esc** stop. "
    "The boxes below select a token without a mouse; the choices above say how."
)
LEAVING = "The edits of this trajectory are not saved. Go on without them?"
CSS = files(__package__).joinpath("studio.css").read_text(encoding="utf-8")


def script(tips: Mapping[str, str]) -> str:
    """The function that the page calls when it is loaded. tips: tooltip of each control by its id."""
    function = files(__package__).joinpath("studio.js").read_text(encoding="utf-8")
    return f"() => ({function})({json.dumps(tips)}, {json.dumps(KEYS)}, {json.dumps(LEAVING)})"
