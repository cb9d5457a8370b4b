"""Paths at URLs whose questions say what the store said, and whose names are taken literally.

In universal-pathlib `exists` and its like are False for any error of a store, so a build would count as absent when
credentials have expired; and names are patterns where objects are removed or listed, so `set[1]` would stand for
`set1`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from upath import UPath
from upath.implementations.cloud import AzurePath, GCSPath, S3Path
from upath.implementations.memory import MemoryPath
from upath.registry import register_implementation

from hierarchy_builder.files import remote

RemotePath = UPath
"""What makes a path of a URL; once this module is loaded, one of the classes below."""


class Literal:
    """The methods that a path at a URL has in place of those of UPath."""

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object, or objects below this name. Raises what the store raises."""
        return remote.info(self._path) is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object. Raises what the store raises."""
        return (remote.info(self._path) or {}).get("type") == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there are objects below this name. Raises what the store raises."""
        return (remote.info(self._path) or {}).get("type") == "directory"

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(str(self))
        remote.remove([self._path])

    def iterdir(self) -> Iterator[Any]:
        """Yield what lies directly below this name."""
        own = cast(Any, self)
        for name in own.fs.ls(own.path, detail=False):
            yield own / name.rstrip("/").rpartition("/")[2]

    def glob(
        self, pattern: str, *, case_sensitive: Any = None, recurse_symlinks: bool = False
    ) -> Iterator[Any]:
        """Yield the objects below this name whose names match the pattern, part by part; `**` is not understood."""
        wanted, start = pattern.split("/"), self._path
        while len(wanted) > 1 and not set(wanted[0]) & set("*?["):
            start /= wanted.pop(0)
        for path in remote.files_below(start):
            parts = path.relative_to(start).parts
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield path

    @property
    def _path(self) -> Path:
        return cast(Path, self)


class S3(Literal, S3Path):
    """A place in Amazon S3 or a store that speaks its protocol."""


class Google(Literal, GCSPath):
    """A place in Google Cloud Storage."""


class Azure(Literal, AzurePath):
    """A place in Azure Blob Storage."""


class Memory(Literal, MemoryPath):
    """A place in the memory of this process."""


OF_CLIENT: dict[str, Any] = {"s3fs": S3, "gcsfs": Google, "adlfs": Azure, "fsspec": Memory}
for _scheme, (_client, _) in remote.CLIENTS.items():
    register_implementation(_scheme, OF_CLIENT[_client], clobber=True)
