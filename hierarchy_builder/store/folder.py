"""The folder of a build: the path of every file, the files a build may remove, and the lock for its one writer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hierarchy_builder.errors import UsageError, VerificationError
from hierarchy_builder.files import remote
from hierarchy_builder.files.exclusion import (
    BusyError,
    discard,
    exclusive,
    is_taken,
    of_exclusion,
    still_ours,
)
from hierarchy_builder.files.paths import remote_place
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import guard, is_there, readable_json, refuse_links, repair_of

OWN_FILES = r"""
    (?:manifest|class_map|quality|\.progress)\.json | (?:index\.parquet|vocabulary\.npz)
  | (?:report|quality|vocabulary)\.html
  | ledger/(?:manifest\.json|listing\.parquet|\w+/\d{6}\.(?:json|begun))
  | (?:features\.zarr|regions\.zarr|regions\.zarr\.recut)/(?:(?:\w+/)?zarr\.json|\w+/c(?:/\d+)+)
  | parts/\d{6}\.(?:tar|npz)
  | vocabulary/(?:tokens-\d{6}\.np[yz]|state\.npz)
  | shards/(?:README\.md|preview\.png|_SUCCESS)
  | shards/(?:SPLIT-\d{6}\.(?:tar|json)|(?:index|class_map|croissant)\.json|(?:statistics|vocabulary)\.npz)
"""
"""Pattern of the relative paths of all files that a build writes; only files that match are ever removed."""

OWN_FOLDERS = r"""
    ledger/\w+ | parts | vocabulary | shards
  | (?:features\.zarr|regions\.zarr|regions\.zarr\.recut)(?:/\w+(?:/c(?:/\d+)*)?)?
"""
"""Pattern of the folders that a build makes for them; they are removed once they are empty, and no others."""

LEFTOVER = re.compile(
    r"(?P<whole>.+)\.tmp-\d+|"
    r"(?P<store>(?:features|regions)\.zarr(?:\.recut)?)/(?:.+/)?\.?(?:zarr|\d+)\.[0-9a-f]+\.partial",
    re.ASCII,
)
"""Pattern of the temporary files of killed runs: names of `whole_file`, and inside a store those of zarr."""

MARKS = {
    "preview.png": b"Software\0trajectory-hierarchies",
    "croissant.json": b'"name": "teacher-hierarchies-',
}
"""What files beside the tars hold that earlier releases did not write: without it they are somebody else's."""

MARKERS = "[0-9]" * 6 + ".json"
"""Pattern of the names of unit markers in the folder of a ledger."""
BEGUN = ".begun"
"""Suffix, beside markers, of what `repair` notes of a unit while it makes it again."""


class _Place:
    """The path of one file or folder of a build, `name` relative to the build folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: BuildFolder, owner: type[BuildFolder] | None = None) -> Path:
        return folder.root / self.name


@dataclass(frozen=True, slots=True)
class BuildFolder:
    """The folder of one build; every file that the build writes has one place in it."""

    root: Path

    manifest = _Place("manifest.json")
    manifest_copy = _Place("ledger/manifest.json")
    """A copy of the manifest, from which repair restores it."""
    listing = _Place("ledger/listing.parquet")
    """The images as listed, in the order of rows: index.parquet before any outcome is known."""
    index = _Place("index.parquet")
    class_map = _Place("class_map.json")
    features = _Place("features.zarr")
    regions = _Place("regions.zarr")
    recut = _Place("regions.zarr.recut")
    """Holds the regions of other cuts until all are written and move to regions.zarr."""
    vocabulary = _Place("vocabulary.npz")
    vocabulary_work = _Place("vocabulary")
    """Holds the state of an unfinished vocabulary fit; removed afterwards."""
    parts = _Place("parts")
    """Holds one tar and one npz of each unit of a fused build, see `part` and `part_moments`."""
    shards = _Place("shards")
    live = _Place(".progress.json")
    """The progress of the stage that runs now; removed when the stage ends."""
    report = _Place("report.html")
    quality = _Place("quality.json")
    quality_page = _Place("quality.html")
    vocabulary_page = _Place("vocabulary.html")

    def part(self, number: int) -> Path:
        """Return the tar that holds the samples of one unit of a fused build until they are in shards."""
        return self.parts / f"{number:06d}.tar"

    def part_moments(self, number: int) -> Path:
        """Return the npz with the statistics of the same samples; it is kept."""
        return self.part(number).with_suffix(".npz")

    def ledger(self, stage: str) -> Path:
        """Return the folder of the markers of one stage."""
        return self.root / "ledger" / stage

    def marker(self, stage: str, unit: int) -> Path:
        """Return the marker of one unit, which may not be there."""
        return self.ledger(stage) / f"{unit:06d}.json"

    def markers(self, stage: str) -> list[Path]:
        """Return the markers of the finished units of one stage in order, or of all stages for `*`."""
        return sorted((self.root / "ledger").glob(f"{stage}/{MARKERS}"))

    def is_build(self) -> bool:
        """Whether the folder has a readable manifest, a copy of one, or the marker of a unit."""
        signs = {"format_version": (self.manifest, self.manifest_copy), "stage_hash": self.markers("*")}
        return any(field in readable_json(path) for field, paths in signs.items() for path in paths)

    def own_files(self, place: Path, split: str | None = None) -> list[Path]:
        """Return the file `place`, or files below it, if a build writes them; only the tars of `split`, if given."""
        own = _own_pattern(split)
        return [path for path in _files_of(place) if own.fullmatch(self._name(path)) and is_own_about(path)]

    def remove(self, place: Path, split: str | None = None) -> None:
        """Remove the files that `own_files` returns and, of a folder, temporary files of killed runs below it.

        The folders of a build that are empty then go too, and nothing else.
        """
        still_ours(self.root)
        if is_remote(place):  # an object store has no folders
            remote.remove(self.own_files(place, split))
            return
        for path in self.own_files(place, split):
            path.unlink(missing_ok=True)
        if place.is_dir():
            self.remove_leftovers(place)
        own = re.compile(OWN_FOLDERS, re.VERBOSE | re.ASCII)
        for parent, _, _ in os.walk(place, topdown=False):
            if own.fullmatch(self._name(Path(parent))):
                with contextlib.suppress(OSError):  # it holds other files, or it is a link
                    os.rmdir(parent)

    def remove_leftovers(self, place: Path | None = None) -> None:
        """Remove the temporary files of killed runs, below `place` or in the whole build; at a URL there are none."""
        if is_remote(self.root):
            return
        own = _own_pattern()
        beside = [path for path in self.root.iterdir() if not path.is_dir()] if place is None else []
        places = [self.root / name for name in self._own_names()] if place is None else [place]
        for path in itertools.chain(beside, *map(_files_of, places)):
            found = LEFTOVER.fullmatch(self._name(path))
            if found and (found["store"] or own.fullmatch(found["whole"])):
                path.unlink(missing_ok=True)

    def refuse_foreign(self, places: Iterable[Path]) -> None:
        """Raise UsageError naming those of `places` that exist; the caller knows that no build made them."""
        if foreign := [self._name(place) for place in places if is_there(place)]:
            raise UsageError(
                f"{self.root} holds {', '.join(foreign)}, which no build has made and a build would overwrite: "
                "choose an empty or new folder with --out, or move the files away"
            )

    def _own_names(self) -> list[str]:
        """Return the names that a build uses directly in its folder."""
        names = (place.name for place in vars(BuildFolder).values() if isinstance(place, _Place))
        return list(dict.fromkeys(name.partition("/")[0] for name in names))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def is_there(self) -> bool:
        """Whether the folder has a manifest or its copy, maybe damaged."""
        return self.manifest.is_file() or self.manifest_copy.is_file()

    def require(self, *, damaged: bool = False) -> BuildFolder:
        """Return self, guarded. Raises UsageError when this is not the folder of a build.

        damaged: accept a build that has only the copy of the manifest; it is a VerificationError otherwise.
        """
        if not damaged and self.is_there() and not self.manifest.is_file():
            raise VerificationError(f"{self.manifest} is missing: {repair_of(self.manifest)}")
        if not self.is_there():
            is_run, is_set = (self.root / "checkpoints").is_dir(), (self.root / "index.json").is_file()
            if is_run:
                advice = "it is a run of `trainer train`, which the verbs of `trainer` take"
            elif is_set:
                advice = (
                    "it is a finished shard set, which `hierarchy-builder verify` and `trainer train` take"
                )
            else:
                advice = f"start one with `hierarchy-builder build IMAGES --out {self.root}`"
            raise UsageError(f"{self.root} is not a build: {self.manifest.name} is missing; {advice}")
        guard(self.root)
        return self

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Be the one writer of the build, see `exclusion`; BusyError if there is another.

        Raises UsageError where no build can be: at a file, or in a folder with files of these names that no build
        made. A new folder in which no stage started is removed again.
        """
        is_new = not is_remote(self.root) and not self.root.exists()
        if not self.is_build():
            self.refuse_foreign(self.root / name for name in self._own_names())
        guard(self.root)
        with contextlib.ExitStack() as held:
            try:
                if not is_remote(self.root):
                    self.root.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(self.root, say))
            except BusyError as error:
                look = f"`hierarchy-builder status {self.root}` shows how far it is"
                raise BusyError(f"{error}: wait until it has ended; {look}") from None
            except OSError as error:
                if is_remote(self.root):
                    raise
                raise UsageError(
                    f"--out {self.root}: {error.strerror}, expected a folder to write to"
                ) from None
            self._refuse_links()
            try:
                yield
            finally:
                if is_new and all(map(of_exclusion, os.listdir(self.root))):
                    discard(self.root)
                    self.root.rmdir()

    def _refuse_links(self) -> None:
        """Raise UserError where a file that a build would write is a link out of its folder; chunks replace links."""
        if is_remote(self.root):
            return
        refuse_links(self.root, self._own_names())
        ledger = self.manifest_copy.parent
        ledgers = [ledger, *ledger.iterdir()] if ledger.is_dir() else []
        for place in (*ledgers, self.parts, self.shards, self.vocabulary_work):
            refuse_links(place)

    def is_locked(self) -> bool:
        """Whether a writer works on the build now."""
        return is_taken(self.root)

    def check_apart(self, images: str) -> None:
        """Raise UsageError if the build lies in the folder `images`, where it would be listed as a class."""
        if is_remote(self.root):
            scheme, separator, _ = images.partition("://")
            if not separator or scheme not in remote.CLIENTS:  # no URL that a build may have too
                return
            root, place = self.root, remote_place(images)
        else:
            root, place = self.root.resolve(), Path(images).resolve()
            if not place.is_dir():
                return
        if not (root == place or root.is_relative_to(place)):
            return
        inside = root.relative_to(place).parts if root != place else ()
        if not inside or not inside[0].startswith("."):
            raise UsageError(
                f"--out {self.root} lies inside the images {images}, where its folders would be taken for "
                "classes: choose a folder outside"
            )


def is_own_about(path: Path) -> bool:
    """Whether a build wrote this file beside the tars, or may: not if it has the name of one, and not its mark."""
    mark = MARKS.get(path.name)
    return mark is None or not path.is_file() or mark in path.read_bytes()


@functools.cache
def _own_pattern(split: str | None = None) -> re.Pattern[str]:
    names = OWN_FILES.replace("SPLIT", r"\w+" if split is None else re.escape(split))
    return re.compile(names, re.VERBOSE | re.ASCII)


def _files_of(place: Path) -> Iterator[Path]:
    """Yield `place` if it is a file, or else the files below it, without following links."""
    if is_remote(place):
        yield from remote.files_below(place)
        return
    if not place.is_dir():
        yield from [place] if os.path.lexists(place) else []
        return
    for parent, _, names in os.walk(place):
        yield from (Path(parent, name) for name in sorted(names))
