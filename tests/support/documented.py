"""Which printed names docs/metrics.md does not explain."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
NUMBER = re.compile(r"(?<=_)(ℓ|[abk])(?=_|$)")
"""A letter of the page that stands for a number in a name."""


def undocumented(names: Iterable[str]) -> list[str]:
    """Names that are not, with or without one of its endings, a name in backquotes on the page."""
    known, endings = _known()
    return [name for name in names if not re.fullmatch(f"(?:{known})(?:{endings})?", name)]


@cache
def _known() -> tuple[str, str]:
    spans = re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8"))
    patterns = {NUMBER.sub(r"\\d+", span) for span in spans}
    endings = {pattern for pattern in patterns if pattern.startswith("_")}
    return "|".join(sorted(patterns - endings)), "|".join(sorted(endings))
