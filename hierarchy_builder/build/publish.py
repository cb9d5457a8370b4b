"""Finished shards → a folder of any file system fsspec knows: `s3://`, `gs://`, `hf://`, `memory://`, a local path.

An object store has no rename, so order takes its place: a tar, then its sidecar, which says the tar is whole; what
describes the set after all tars, `_SUCCESS` last. `_SUCCESS` of another set is taken away before anything is changed.
The same call goes on where one was stopped: a tar whose sidecar is there is not sent again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from hierarchy_builder.build.session import StageSummary
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.artefacts import BuildFolder, read_json
from hierarchy_builder.store.shard_set import SUCCESS
from hierarchy_builder.store.shards import sidecar

TRANSFERS = 8
"""Tars on their way at once."""


def publish_to(folder: BuildFolder, url: str, reporter: Reporter) -> StageSummary:
    """Copy the finished shards of a build to `url`; the notes tell files sent and in all.

    Tars, sidecars and `_SUCCESS` of a longer or other set there are removed; nothing else is.
    Raises UsageError for a URL that is not understood, BuilderError where the shards are not finished, where the
    store refuses, and where an object has another size than its file.
    """
    if not (folder.shards / SUCCESS).is_file():
        raise BuilderError(f"{folder.shards} has no {SUCCESS}: finish the shards before they are published")
    place, started = _Place.of(url), time.perf_counter()
    index = read_json(folder.shards / "index.json")
    counts = {folder.shards / entry["url"]: entry["nsamples"] for entry in index["shardlist"]}
    try:
        sent = list(_send(folder, counts, place, reporter))
    except OSError as error:
        raise BuilderError(f"{url}: {error}; the same command goes on from here") from error
    files = [path for path in folder.shards.iterdir() if path.is_file()]
    return StageSummary(
        stage="publish",
        images=index["num_samples"],
        new_images=sum(counts.get(path, 0) for path in sent),
        seconds=time.perf_counter() - started,
        num_bytes=sum(path.stat().st_size for path in files),
        notes={"url": url, "files": len(files), "sent": len(sent)},
    )


def _send(
    folder: BuildFolder, counts: Mapping[Path, int], place: _Place, reporter: Reporter
) -> Iterator[Path]:
    """Send what is not there yet, markers last; yields the files sent. counts: samples of each tar."""
    shards, tars = folder.shards, list(counts)
    markers = [sidecar(tar) for tar in tars]
    about = sorted(
        {path for path in shards.iterdir() if path.is_file()} - {*tars, *markers, shards / SUCCESS}
    )
    changed = [path for path in [*markers, *about, shards / SUCCESS] if not place.holds(path)]
    if not changed:
        return
    place.remove(SUCCESS)
    waiting = [tar for tar in tars if sidecar(tar) in changed]
    done = sum(counts[tar] for tar in tars if tar not in waiting)
    with (
        reporter.stage("publish", sum(counts.values()), done) as meter,
        ThreadPoolExecutor(TRANSFERS) as pool,
    ):
        for tar in pool.map(place.send_tar, waiting):
            meter.advance(counts[tar])
            yield from (tar, sidecar(tar))
    for path in about:
        if path in changed:
            place.send(path)
            yield path
    place.remove_strays(
        {path.name for path in (*tars, *markers)}, tars[0].name.rpartition("-")[0] if tars else ""
    )
    place.send(shards / SUCCESS)
    yield shards / SUCCESS


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """File system and path of a URL; nothing is written there. Raises UsageError for one that is not understood."""
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{url}: {error}; expected a URL of a file system that fsspec knows and whose package is installed "
            "(s3fs for s3://, gcsfs for gs://, huggingface_hub for hf://)"
        ) from None


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder of a file system."""

    fs: AbstractFileSystem
    root: str

    @classmethod
    def of(cls, url: str) -> _Place:
        fs, root = open_url(url)
        fs.makedirs(root, exist_ok=True)
        return cls(fs, root.rstrip("/"))

    def holds(self, path: Path) -> bool:
        """Whether a small file is there with this content."""
        try:
            return self.fs.cat_file(self._name(path.name)) == path.read_bytes()
        except FileNotFoundError:
            return False

    def send_tar(self, tar: Path) -> Path:
        """A tar, then its sidecar; the one there goes first, since it vouches for another tar."""
        self.remove(sidecar(tar).name)
        self.send(tar)
        self.send(sidecar(tar))
        return tar

    def send(self, path: Path) -> None:
        name = self._name(path.name)
        self.fs.put_file(str(path), name)
        self.fs.invalidate_cache()
        found, expected = int(self.fs.info(name)["size"]), path.stat().st_size
        if found != expected:
            raise BuilderError(
                f"{name} has {found:,} bytes after it was sent, expected {expected:,}: send it again"
            )

    def remove(self, name: str) -> None:
        if self.fs.exists(self._name(name)):
            self.fs.rm_file(self._name(name))

    def remove_strays(self, names: set[str], split: str) -> None:
        """Remove tars and sidecars of this split that are not among `names`."""
        for place in self.fs.ls(self.root, detail=False, refresh=True):
            name = place.rsplit("/", 1)[-1]
            stem, _, ending = name.rpartition(".")
            number = stem.removeprefix(f"{split}-")
            if ending in ("tar", "json") and len(number) == 6 and number.isdigit() and name not in names:
                self.fs.rm_file(self._name(name))

    def _name(self, name: str) -> str:
        return f"{self.root}/{name}"
