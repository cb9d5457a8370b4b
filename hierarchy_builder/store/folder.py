"""The folder of a build: where each artefact is, which files are its own, and who writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.files import read_json, target_of

OWN_FILES = r"""
    (?:manifest|class_map|quality|\.progress)\.json | (?:index\.parquet|vocabulary\.npz)
  | (?:report|quality|vocabulary)\.html
  | ledger/(?:manifest\.json|listing\.parquet|\w+/\d{6}\.json)
  | (?:features\.zarr|regions\.zarr|regions\.zarr\.recut)/(?:(?:\w+/)?zarr\.json|\w+/c(?:/\d+)+)
  | parts/\d{6}\.(?:tar|npz)
  | vocabulary/(?:tokens-\d{6}\.npy|state\.npz)
  | shards/(?:SPLIT-\d{6}\.(?:tar|json)|(?:index|class_map)\.json|(?:statistics|vocabulary)\.npz|README\.md|_SUCCESS)
"""
"""Every file a build writes into its folder, as a pattern of its path from there; only such files are removed."""

OWN_FOLDERS = r"""
    ledger/\w+ | parts | vocabulary | shards
  | (?:features\.zarr|regions\.zarr|regions\.zarr\.recut)(?:/\w+(?:/c(?:/\d+)*)?)?
"""
"""The folders it makes for them; only such are removed, once they are empty."""

LEFTOVER = re.compile(
    r"(?P<whole>.+)\.tmp-\d+|"
    r"(?P<store>(?:features|regions)\.zarr(?:\.recut)?)/(?:.+/)?\.?(?:zarr|\d+)\.[0-9a-f]+\.partial",
    re.ASCII,
)
"""What a killed run leaves of a file: the temporary name of `whole_file`, and inside a store that of zarr."""

MARKERS = "[0-9]" * 6 + ".json"
"""Markers of units among the files of a ledger."""


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

    def markers(self, stage: str) -> list[Path]:
        """Markers of finished units of one stage, in order; `*` for those of all."""
        return sorted((self.root / "ledger").glob(f"{stage}/{MARKERS}"))

    def is_build(self) -> bool:
        """Whether something here carries the mark of a build: its manifest, the copy, or the marker of a unit."""
        marks = {"format_version": (self.manifest, self.manifest_copy), "stage_hash": self.markers("*")}
        return any(mark in _told(path) for mark, paths in marks.items() for path in paths)

    def own_files(self, place: Path, split: str | None = None) -> list[Path]:
        """The file `place` or the files below it that a build writes; of tars only those of `split`, if given."""
        own = _own_pattern(split)
        return [path for path in _files_of(place) if own.fullmatch(self._name(path))]

    def remove(self, place: Path, split: str | None = None) -> None:
        """Remove what `own_files` finds, and the folders of a build that are empty then; nothing else."""
        for path in self.own_files(place, split):
            path.unlink(missing_ok=True)
        own = re.compile(OWN_FOLDERS, re.VERBOSE | re.ASCII)
        for parent, _, _ in os.walk(place, topdown=False):
            if own.fullmatch(self._name(Path(parent))):
                with contextlib.suppress(OSError):  # somebody else's files are in it, or it is a link
                    os.rmdir(parent)

    def remove_leftovers(self, place: Path | None = None) -> None:
        """Remove what killed runs left of files that a build writes, below `place` or anywhere."""
        own = _own_pattern()
        places = [self.root / name for name in self._own_names()] if place is None else [place]
        files = [*_files_of(self.root, is_deep=False)] if place is None else []
        files += [file for place in places for file in _files_of(place)]
        for path in files:
            found = LEFTOVER.fullmatch(self._name(path))
            if found and (found["store"] or own.fullmatch(found["whole"])):
                path.unlink(missing_ok=True)

    def refuse_foreign(self, places: Iterable[Path]) -> None:
        """Raise UsageError naming those of `places` that are there, where they are no build's."""
        if foreign := [str(place.relative_to(self.root)) for place in places if os.path.lexists(place)]:
            raise UsageError(
                f"{self.root} holds {', '.join(foreign)} but no build that made "
                f"{'it' if len(foreign) == 1 else 'them'}, and would write there: choose an empty or new folder "
                "with --out, or move what is there away"
            )

    def _own_names(self) -> list[str]:
        files = (self.manifest, self.index, self.class_map, self.vocabulary, self.vocabulary_page, self.live)
        pages = (self.report, self.quality, self.quality_page)
        folders = (self.features, self.regions, self.recut, self.vocabulary_work, self.shards)
        more = (self.part(0).parent, self.manifest_copy.parent)
        return [place.name for place in (*files, *pages, *folders, *more)]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

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
        if not self.is_build():
            self.refuse_foreign(self.root / name for name in self._own_names())
        lock = target_of(self.root / ".lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a")  # noqa: SIM115 (closed below)
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
                    lock.unlink()
                    self.root.rmdir()

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


@functools.cache
def _own_pattern(split: str | None = None) -> re.Pattern[str]:
    names = OWN_FILES.replace("SPLIT", r"\w+" if split is None else re.escape(split))
    return re.compile(names, re.VERBOSE | re.ASCII)


def _files_of(place: Path, *, is_deep: bool = True) -> Iterator[Path]:
    """`place` where it is a file, or the files below it; no link below it is followed."""
    if not place.is_dir():
        yield from [place] if os.path.lexists(place) else []
        return
    for parent, folders, names in os.walk(place):
        yield from (Path(parent, name) for name in sorted(names))
        if not is_deep:
            folders.clear()


def _told(path: Path) -> dict[str, Any]:
    """What a JSON object holds, nothing where it cannot be read."""
    try:
        return read_json(path)
    except (BuilderError, OSError):
        return {}
