"""The one folder the studio reads and writes: names in, paths inside it out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hierarchy_builder.errors import UsageError

NAME = re.compile(r"\w[\w -]{0,79}")
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class StudioFolder:
    """A folder of saved trajectories, pages and reports."""

    root: Path

    def path(self, name: str | None, suffix: str) -> Path:
        """Where `name` lies. Raises UsageError for a name that is no plain one, or leads out of the folder."""
        if not name or not NAME.fullmatch(name):
            raise UsageError(
                f"the name is {name or ''!r}, expected letters, digits, spaces, - or _, at most 80, without folders"
            )
        path = self.root / f"{name}{suffix}"
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise UsageError(f"{name} is a link that leads out of {self.root}: save under another name")
        return path

    def trajectory(self, name: str | None) -> Path:
        """A saved trajectory. Raises UsageError naming those there are."""
        path = self.path(name, SUFFIX)
        if not path.is_file():
            raise UsageError(
                f"no trajectory {name!r} in {self.root}, found {', '.join(self.names()) or 'none'}"
            )
        return path

    def names(self) -> list[str]:
        """Saved trajectories, by name."""
        found = (path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))
        return sorted(name for name in found if NAME.fullmatch(name))
