"""What verify finds and repair mends."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST = "manifest"
"""In the place of a stage: the manifest itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One thing in a build that is not as it was made."""

    stage: str
    """Whose work it is: a name of `ledger.STAGES`, `covariance` or `manifest`."""
    text: str
    """Where, what was found, what was expected."""
    unit: int | None = None
    """The unit that wrote it; None for what a stage makes of all its units together, or left to do."""
    is_stale: bool = False
    """Whether nothing is broken, but what the stage was made from has been made anew since."""
