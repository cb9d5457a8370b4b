"""Finished shards → a folder of any file system fsspec knows: `s3://`, `gs://`, `hf://`, `memory://`, a local path.

An object store has no rename, so order takes its place: a tar, then its sidecar, which says the tar is whole; what
describes the set after all tars, `_SUCCESS` last. `_SUCCESS` of another set is taken away before anything is changed.
The same call goes on where one was stopped: a tar whose sidecar is there is not sent again.

What lies there already is changed only where it is ours: `_PUBLISHING`, written first and removed last, names the files
of a transfer; a finished set has its index.json. Anything else of the names to be written is refused.

One process at a time publishes to a place (see `files/exclusion.py`). Where a store can neither lock nor create a
file only if there is none, `_PUBLISHING` of another set is refused until it is finished or removed. Of two that begin
at once on the hub, the second is refused, since `_PUBLISHING` follows the commit that was looked at, or is not
written.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hierarchy_builder.build.session import StageSummary
from hierarchy_builder.errors import (
    ADVICE,
    FULL,
    BuilderError,
    UsageError,
    UserError,
    VerificationError,
)
from hierarchy_builder.files.exclusion import BusyError, discard, exclusive
from hierarchy_builder.files.paths import a_folder, filesystem_of, may_hold_builds
from hierarchy_builder.files.remote import PART_BYTES, is_remote, store_error, upload_to
from hierarchy_builder.files.whole import (
    guard,
    json_text,
    parse_json,
    read_json,
    refuse_links,
    sha256_file,
)
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store import shard_set
from hierarchy_builder.store.folder import MARKS, BuildFolder, is_own_about
from hierarchy_builder.store.shard_set import SUCCESS, success_problems
from hierarchy_builder.store.shards import sidecar, sidecar_problems

PUBLISHING = "_PUBLISHING"
"""Names the files of a set whose transfer began."""

ABOUT = (*shard_set.ABOUT, SUCCESS)
"""What may stand beside the tars of a set."""

SHARD_FILE = re.compile(r"\w+-\d{6}\.(?:tar|json)", re.ASCII)
"""A tar or its sidecar."""

TRANSFERS = 8
"""Tars on their way at once; to the Hugging Face hub one, where each file is a commit on the one before."""

HUB = "hf://datasets/"


def publish_to(folder: BuildFolder, url: str, reporter: Reporter) -> StageSummary:
    """Copy the finished shards of a build to `url`; the notes tell files sent and in all.

    Tars, sidecars and `_SUCCESS` of a longer or other set of builds there are removed; nothing else is.
    Raises UsageError for a URL that is not understood and where files there that no build published have the names of
    those to be written, BuilderError where the shards are not finished, where another process publishes to the same
    place, where the store refuses, and where an object has another size than its file.
    """
    if not (folder.shards / SUCCESS).is_file():
        raise BuilderError(f"{folder.shards} has no {SUCCESS}: finish the shards before they are published")
    started = time.perf_counter()
    index = read_json(folder.shards / "index.json")
    for problem in _problems(folder.shards, index):
        raise VerificationError(
            f"{problem}: run `hierarchy-builder repair {folder.root}`, then publish again"
        )
    counts = {folder.shards / entry["url"]: entry["nsamples"] for entry in index["shardlist"]}
    beside = (folder.shards / name for name in sorted(shard_set.ABOUT))
    about = [path for path in beside if path.is_file() and is_own_about(path)]
    files = [*counts, *map(sidecar, counts), *about, folder.shards / SUCCESS]
    with answers_of(url), _one_writer(url, reporter) as is_alone:
        sent = list(_send(files, counts, _Place.of(url), reporter, is_alone=is_alone))
    return StageSummary(
        stage="publish",
        images=index["num_samples"],
        new_images=sum(counts.get(path, 0) for path in sent),
        seconds=time.perf_counter() - started,
        num_bytes=sum(path.stat().st_size for path in files),
        notes={"url": url, "files": len(files), "sent": len(sent)},
    )


@contextlib.contextmanager
def answers_of(url: str) -> Iterator[None]:
    """Turn what the file system of a URL raises, which has its own exceptions, into one error with the next step."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if url.startswith(HUB) and isinstance(error, FileNotFoundError):
            name = url.removeprefix(HUB).partition("@")[0]
            raise BuilderError(
                f"{url}: the hub shows no such data set to you; create it with `hf repos create "
                f"{'/'.join(name.split('/')[:2])} --type dataset` (--private hides it), or log in with `hf auth login`"
            ) from None
        if isinstance(error, OSError) and error.errno in FULL:
            raise BuilderError(f"{url}: {error.strerror}; {ADVICE[error.errno]}") from None
        if (told := store_error(error)) is not None:
            raise told from error
        raise BuilderError(
            f"{url}: {_first_line(error)}; the same command goes on from here, once URL, network and permissions "
            "allow it"
        ) from error


@contextlib.contextmanager
def _one_writer(url: str, reporter: Reporter) -> Iterator[bool]:
    """Be the only process that publishes to a URL; yields whether its store can tell. Raises BusyError if it is not."""
    open_url(url)  # says what is wrong with one that is not understood
    if not may_hold_builds(url):
        yield False
        return
    place = a_folder(url)
    if not is_remote(place):
        place.mkdir(parents=True, exist_ok=True)
        guard(place)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(place, reporter.say))
        except BusyError as error:
            raise BusyError(f"{error}: wait until it has ended, or publish to another place") from None
        held.callback(discard, place)  # a published set holds the files of the set alone
        yield True


def _send(
    files: Sequence[Path], counts: Mapping[Path, int], place: _Place, reporter: Reporter, *, is_alone: bool
) -> Iterator[Path]:
    """Send what is not there yet; yields the files sent.

    files: the tars, their sidecars, what describes the set, and `_SUCCESS`. counts: samples of each tar.
    is_alone: whether it is certain that no other process sends to this place now.
    """
    *_, success = files
    changed = [path for path in files if path not in counts and not place.holds(path)]
    own = place.own_names()
    if not changed:
        if PUBLISHING in own:
            place.remove(PUBLISHING)
        return
    names, split = {path.name for path in files}, files[0].name.rpartition("-")[0]
    of_split = {
        name for name in place.kinds if SHARD_FILE.fullmatch(name) and name.rpartition("-")[0] == split
    }
    strays = sorted(of_split - names)
    theirs = [*files, *map(success.with_name, (PUBLISHING, *strays))]
    place.refuse_foreign([path for path in theirs if path.name not in own])
    if isinstance(place.fs, LocalFileSystem):
        refuse_links(Path(place.root), [path.name for path in theirs])
    digest, begun = sha256_file(success), place.begun()
    if not is_alone and begun.get("set", digest) != digest:
        raise BuilderError(
            f"{place.root} holds {PUBLISHING} of another set, whose transfer is going on or was stopped: wait until it "
            f"has ended, or remove {PUBLISHING} there if it is given up"
        )
    told = {"publishes": "hierarchy-builder", "set": digest, "files": sorted(names | own)}
    place.claim(json_text(told))
    place.remove(SUCCESS)
    waiting = [tar for tar in counts if sidecar(tar) in changed]
    done = sum(counts.values()) - sum(counts[tar] for tar in waiting)
    with (
        reporter.stage("publish", sum(counts.values()), done) as meter,
        ThreadPoolExecutor(1 if "hf" in place.fs.protocol else TRANSFERS) as pool,
    ):
        for tar in pool.map(place.send_tar, waiting):
            meter.advance(counts[tar])
            yield from (tar, sidecar(tar))
    for path in changed:
        if path.name in shard_set.ABOUT:
            place.send(path)
            yield path
    if place.begun() != told:
        raise BuilderError(
            f"{place.root}: another process publishes to it: wait until that has ended, then repeat this"
        )
    for name in strays:
        place.remove(name)
    place.send(success)
    yield success
    place.remove(PUBLISHING)


def _problems(shards: Path, index: Mapping[str, Any]) -> Iterator[str]:
    """Compare every file of a set with what vouches for it, but for the tars: each is read before it is sent."""
    yield from success_problems(shards, index)
    for entry in index["shardlist"]:
        told = {"count": entry["nsamples"], "bytes": entry["filesize"]}
        yield from sidecar_problems(shards / entry["url"], {**index, **entry, **told})


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """File system and path of a URL; nothing is written there. Raises UsageError for one that is not understood."""
    try:
        return filesystem_of(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{url}: {error}; expected a URL of a file system that fsspec knows and whose package is installed "
            "(s3fs for s3://, gcsfs for gs://, huggingface_hub for hf://)"
        ) from None
    except Exception as error:  # some file systems look at the network here
        raise BuilderError(
            f"{url}: {_first_line(error)}; check the URL, the network and your permission"
        ) from None


class _Repository(NamedTuple):
    """A repository on the hub, as `api` wants it named, and a path in it."""

    api: Any
    place: dict[str, str]
    inside: str


def _repository(fs: AbstractFileSystem, path: str) -> _Repository | None:
    """The repository that a path lies in; None for a bucket of the hub, which has no commits, and elsewhere."""
    if "hf" not in fs.protocol or not hasattr(found := fs.resolve_path(path), "repo_id"):
        return None
    from huggingface_hub import HfApi

    place = {"repo_id": found.repo_id, "repo_type": found.repo_type, "revision": found.revision}
    return _Repository(HfApi(endpoint=fs.endpoint, token=fs.token), place, found.path_in_repo)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder of a file system. kinds: what is there by name, `file` or something else. commit: of the hub, before."""

    fs: AbstractFileSystem
    root: str
    kinds: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None

    @classmethod
    def of(cls, url: str) -> _Place:
        fs, root = open_url(url)
        fs.makedirs(root, exist_ok=True)
        root = root.rstrip("/")
        commit = None
        if hub := _repository(fs, root):
            commit = hub.api.repo_info(**hub.place).sha
        try:
            found = fs.ls(root, detail=True, refresh=True)
        except FileNotFoundError:  # an object store has no empty folders
            found = []
        kinds = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in found}
        return cls(fs, root, kinds, commit)

    def holds(self, path: Path) -> bool:
        """Whether a small file is there with this content."""
        return self.kinds.get(path.name) == "file" and self._read(path.name) == path.read_bytes()

    def own_names(self) -> set[str]:
        """Names of the files there that a build published, or began to."""
        index = self._told("index.json")
        own = set[str]()
        if begun := self.begun():
            own |= {PUBLISHING, *map(str, begun.get("files", []))}
        if {"format_version", "config_hash", "shardlist"} <= index.keys():
            tars = [Path(str(entry.get("url"))) for entry in index["shardlist"]]
            own |= {*(tar.name for tar in tars), *(sidecar(tar).name for tar in tars), *ABOUT}
            there = [name for name in MARKS if self.kinds.get(name) == "file"]
            own -= {name for name in there if MARKS[name] not in self._read(name)}
        told = (name for name in self.kinds if name not in own and SHARD_FILE.fullmatch(name))
        for name in told:  # of a transfer that was stopped before there was an index
            if name.endswith(".json") and {"sha256", "config_hash"} <= self._told(name).keys():
                own |= {name, Path(name).with_suffix(".tar").name}
        return own & self.kinds.keys()

    def begun(self) -> dict[str, Any]:
        """What a transfer wrote that has not ended; nothing where there is none."""
        told = self._told(PUBLISHING)
        return told if told.get("publishes") == "hierarchy-builder" else {}

    def refuse_foreign(self, paths: Iterable[Path]) -> None:
        """Raise UsageError where other things than these files have their names there."""
        there = [path for path in paths if path.name in self.kinds]
        foreign = [path.name for path in there if not (path.name in ABOUT and self.holds(path))]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise UsageError(
                f"{self.root} holds {', '.join(foreign[:3])}{more}, which no build published, where these "
                "shards would go: choose an empty or new folder, or move what is there away"
            )

    def send_tar(self, tar: Path) -> Path:
        """A tar, then its sidecar; the one there goes first, since it vouches for another tar.

        Raises VerificationError if the tar is not the one that its sidecar tells of.
        """
        if sha256_file(tar) != read_json(sidecar(tar))["sha256"]:
            raise VerificationError(
                f"{tar} was changed after it was finished and is not published: "
                f"run `hierarchy-builder repair {tar.parent.parent}`"
            )
        self.remove(sidecar(tar).name)
        self.send(tar)
        self.send(sidecar(tar))
        return tar

    def send(self, path: Path) -> None:
        name = self._name(path.name)
        if is_remote(path):
            with path.open("rb") as source, upload_to(self.fs, name) as target:
                shutil.copyfileobj(source, target, PART_BYTES)
        else:
            self.fs.put_file(str(path), name)
        self.fs.invalidate_cache()
        found, expected = int(self.fs.info(name)["size"]), path.stat().st_size
        if found != expected:
            raise BuilderError(
                f"{name} has {found:,} bytes after it was sent, expected {expected:,}: send it again"
            )

    def claim(self, told: bytes) -> None:
        """Write PUBLISHING. Raises BuilderError on the hub if anything was changed there since it was looked at."""
        name = self._name(PUBLISHING)
        if hub := _repository(self.fs, name):
            try:
                hub.api.upload_file(
                    path_or_fileobj=told, path_in_repo=hub.inside, parent_commit=self.commit, **hub.place
                )
            except OSError as error:
                if getattr(getattr(error, "response", None), "status_code", None) not in (409, 412):
                    raise
                raise BuilderError(
                    f"{self.root} was changed in this moment, maybe by another process that publishes to it: wait "
                    "until that has ended, then repeat this"
                ) from None
        else:
            self.fs.pipe_file(name, told)
        self.fs.invalidate_cache()

    def remove(self, name: str) -> None:
        if self.fs.exists(self._name(name)):
            self.fs.rm_file(self._name(name))

    def _read(self, name: str) -> bytes:
        return self.fs.cat_file(self._name(name))

    def _told(self, name: str) -> dict[str, Any]:
        """What a JSON object there holds; nothing where there is none."""
        if self.kinds.get(name, "file") != "file":  # reading a pipe would never end
            return {}
        try:
            return parse_json(self._read(name))
        except (FileNotFoundError, ValueError):
            return {}

    def _name(self, name: str) -> str:
        return f"{self.root}/{name}"
