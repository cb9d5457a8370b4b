"""Files that are either whole or absent: temporary name, fsync, rename; and where each artefact of a build lives."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hierarchy_builder.errors import BuilderError, UsageError


@dataclass(frozen=True, slots=True)
class BuildFolder:
    """The folder of one build; every artefact has one place in it."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def manifest_copy(self) -> Path:
        """The manifest again, for the day it is damaged."""
        return self.root / "ledger" / "manifest.json"

    @property
    def listing(self) -> Path:
        """The images as listed, in the order of rows: index.parquet before anything was done."""
        return self.root / "ledger" / "listing.parquet"

    @property
    def index(self) -> Path:
        return self.root / "index.parquet"

    @property
    def class_map(self) -> Path:
        return self.root / "class_map.json"

    @property
    def features(self) -> Path:
        return self.root / "features.zarr"

    @property
    def regions(self) -> Path:
        return self.root / "regions.zarr"

    @property
    def recut(self) -> Path:
        """Where the levels of other cuts are made; gone once they are in regions.zarr."""
        return self.root / "regions.zarr.recut"

    @property
    def vocabulary(self) -> Path:
        return self.root / "vocabulary.npz"

    @property
    def vocabulary_work(self) -> Path:
        """Where a vocabulary is being fitted; gone once it is."""
        return self.root / "vocabulary"

    @property
    def vocabulary_page(self) -> Path:
        return self.root / "vocabulary.html"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def live(self) -> Path:
        """What the run that works on the build tells of its stage; gone when it is not at one."""
        return self.root / ".progress.json"

    def part(self, number: int) -> Path:
        """What one unit of a build in one pass leaves until its rows are in shards."""
        return self.root / "parts" / f"{number:06d}.tar"

    def part_moments(self, number: int) -> Path:
        """Statistics of the same rows; they stay."""
        return self.part(number).with_suffix(".npz")

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def quality(self) -> Path:
        return self.root / "quality.json"

    @property
    def quality_page(self) -> Path:
        return self.root / "quality.html"

    def ledger(self, stage: str) -> Path:
        """Folder of the markers of one stage."""
        return self.root / "ledger" / stage

    def require(self, *, damaged: bool = False) -> BuildFolder:
        """Return self, or raise UsageError when this is not the folder of a build.

        damaged: be content with the copy of the manifest.
        """
        if not self.manifest.is_file() and not (damaged and self.manifest_copy.is_file()):
            raise UsageError(
                f"{self.root} is not a build: {self.manifest.name} is missing; "
                f"start one with `hierarchy-builder build IMAGES --out {self.root}`"
            )
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the build for one writer; a second one raises BuilderError at once. Freed by the kernel on exit.

        Raises UsageError where no build can be: at a file, or among things of these names that are no build's.
        A folder in which nothing was begun is taken away again.
        """
        is_new = not self.root.exists()
        self._refuse_foreign()
        lock = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UsageError(f"--out {self.root}: {error.strerror}, expected a folder to write to") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(file.fileno()).st_nlink:
                    raise BlockingIOError  # its owner has just taken the folder away
            except BlockingIOError:
                raise BuilderError(
                    f"{self.root} is being written by another process: wait for it, or choose another --out"
                ) from None
            try:
                yield
            finally:
                if is_new and os.listdir(self.root) == [lock.name]:
                    remove(self.root)

    def is_locked(self) -> bool:
        """Whether a writer holds the build now."""
        try:
            with open(self.root / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _refuse_foreign(self) -> None:
        places = (self.index, self.class_map, self.features, self.regions, self.vocabulary, self.shards)
        foreign = [place.name for place in places if place.exists()]
        if foreign and not self.manifest.exists() and not (self.root / "ledger").exists():
            raise UsageError(
                f"--out {self.root} holds {', '.join(foreign)} but no build ({self.manifest.name} is missing): "
                "choose an empty or new folder"
            )

    def check_apart(self, images: str) -> None:
        """Raise UsageError when the build would lie among the local folder `images`, as one of its classes."""
        root, place = self.root.resolve(), Path(images).resolve()
        if not place.is_dir() or not root.is_relative_to(place):
            return
        inside = root.relative_to(place).parts
        if not inside or not inside[0].startswith("."):
            raise UsageError(
                f"--out {self.root} lies inside the images {images}, where its folders would be taken for "
                "classes: choose a folder outside"
            )


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success it is fsynced and takes the name `path`.

    On any exception the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` under its final name, whole or not at all; an equal file is left untouched."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """Write JSON (UTF-8, sorted keys, two spaces), whole or not at all."""
    write_bytes(path, json_text(content))


def json_text(content: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises BuilderError naming the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"found {type(content).__name__}, expected an object")
    except FileNotFoundError:
        raise BuilderError(f"{path} is missing") from None
    except ValueError as error:
        raise BuilderError(
            f"{path} is damaged ({error}): run `hierarchy-builder repair`, or remove it and run the same command again"
        ) from None
    return content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 when it does not exist."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
