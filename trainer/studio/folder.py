"""The only folder that the studio reads and writes; turns names into paths inside it."""

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
        """Path of the file `name`. Raises UsageError for a name with other characters, or a link out of the folder."""
        if not name or not NAME.fullmatch(name):
            raise UsageError(
                f"the name is {name or ''!r}, expected letters, digits, spaces, - or _, at most 80, without folders"
            )
        path = self.root / f"{name}{suffix}"
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise UsageError(f"{name} is a link that leads out of {self.root}: save under another name")
        return path

    def trajectory(self, name: str | None) -> Path:
        """Path of a saved trajectory. If there is none of that name, raises UsageError with the names that exist."""
        path = self.path(name, SUFFIX)
        if not path.is_file():
            raise UsageError(
                f"no trajectory {name!r} in {self.root}, found {', '.join(self.names()) or 'none'}"
            )
        return path

    def names(self) -> list[str]:
        """Names of the saved trajectories, sorted."""
        found = (path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))
        return sorted(name for name in found if NAME.fullmatch(name))
