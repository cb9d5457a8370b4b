"""The manifest and the markers: with what each stage was made, and which of its units are finished.

manifest.json holds, for every stage, all that decides its result, and the hash of it. ledger/<stage>/NNNNNN.json marks
one finished unit and holds the same hash, so that a marker of another configuration is ignored. Both are sealed: each
holds a checksum of itself, without which a flipped bit would be copied into everything that is made from them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hierarchy_builder import __version__
from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, VerificationError, or_none
from hierarchy_builder.fields import config_hash, difference, from_mapping, to_mapping
from hierarchy_builder.files import remote
from hierarchy_builder.files.exclusion import Lease, still_ours
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import (
    RECORD_VERSION,
    SEAL,
    MissingFileError,
    check_seal,
    decoding,
    read_bytes,
    read_record,
    repair_of,
    require_regular,
    write_json,
    write_record,
)
from hierarchy_builder.images.table import ImageTable, describe_changes
from hierarchy_builder.machine.process import ahead
from hierarchy_builder.records import FORMAT_VERSION, Block
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_images

ResultT = TypeVar("ResultT")

STAGES = ("extract", "vocabulary", "cluster", "link", "shard", "fuse")
"""Stages in the order of the data; `--fresh` removes a stage and all stages after it.

`fuse` is the only stage of a fused build (`build/fused.py`): it does extract, cluster and shard for one block after
another, without stores. Its inputs and its request hold those of the three stages by name.
"""

VERBS = {
    "extract": "extract",
    "vocabulary": "cluster",
    "cluster": "cluster",
    "link": "cluster",
    "shard": "shard",
    "fuse": "build IMAGES --fused --out",
}
"""The command that runs a stage; `cluster DIR` also continues the vocabulary and the links of a build."""

NUM_STORES = {"extract": 1, "vocabulary": 1, "cluster": 1, "link": 2}
"""How many of the first outputs of a stage hold the work of all its units; tars are checked one by one."""

HEAD_BYTES, TAIL_BYTES = 8_192, 32_768
"""Bytes at both ends of a marker, which hold all of its fields but the outcomes of images and the sizes of samples."""
TOP_LEVEL = re.compile(
    rb'\n  "(document_sha256|format_version|images|seconds|stage_hash|unit)": "?([0-9a-f.+-]+)"?,?$',
    re.MULTILINE,
)
"""Begins with a newline, not with `^`: Python looks for given bytes nine times as fast as for the start of a line."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The markers of one stage of a build."""

    folder: Path
    stage_hash: str
    lease: Lease | None = None
    """That of the driver, which a worker has to ask for; None where this process is the writer."""

    def marker(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.json"

    def is_done(self, unit: int) -> bool:
        """Whether `unit` was finished with this configuration; a damaged marker is ignored.

        The seal tells that a marker is whole; parsing the outcomes of its images would take four times as long.
        """
        try:
            text = read_bytes(self.marker(unit))
        except OSError:
            text = b""
        ends = text if len(text) <= HEAD_BYTES + TAIL_BYTES else text[:HEAD_BYTES] + text[-TAIL_BYTES:]
        found = _top_level(ends)
        with contextlib.suppress(ValueError, KeyError):
            check_seal(text, found[SEAL])
            if int(found["format_version"]) == RECORD_VERSION:
                return (found["stage_hash"], int(found["unit"])) == (self.stage_hash, unit)
        # no seal was found: a marker of an earlier release, or one that is damaged
        return or_none(self.result, unit) is not None

    def finished(self, units: Iterable[Block]) -> Iterator[tuple[Block, Marker]]:
        """Yield those of `units` that were finished with this configuration, each with its marker, in order.

        At a URL one listing tells which markers exist, and the next ones are under way while one is used.
        """
        looked = self._of_existing(partial(or_none, self.result), units)
        return ((unit, marker) for unit, marker in looked if marker is not None)

    def glances(self, units: Iterable[Block]) -> Iterator[dict[str, float]]:
        """Yield what `glance` tells of those of `units` that are finished, in order."""
        return (found for _, found in self._of_existing(self.glance, units) if found is not None)

    def missing(self, units: Sequence[Block]) -> list[Block]:
        """Return those of `units` that were not finished with this configuration."""
        done = {unit.number for unit, is_done in self._of_existing(self.is_done, units) if is_done}
        return [unit for unit in units if unit.number not in done]

    def results(self, count: int) -> Iterator[Marker]:
        """Yield the markers of the first `count` units in order; see `result`."""
        return self._of_each(self.result, range(count))

    def _of_existing(
        self, look: Callable[[int], ResultT], units: Iterable[Block]
    ) -> Iterator[tuple[Block, ResultT]]:
        units = list(units)
        if is_remote(self.folder):
            there = {path.name for path in remote.files_below(self.folder)}
            units = [unit for unit in units if self.marker(unit.number).name in there]
        return zip(units, self._of_each(look, [unit.number for unit in units]), strict=True)

    def _of_each(self, look: Callable[[int], ResultT], numbers: Iterable[int]) -> Iterator[ResultT]:
        if not is_remote(self.folder):
            yield from map(look, numbers)
            return
        with ThreadPoolExecutor(remote.AT_ONCE) as pool:
            yield from ahead(pool, look, numbers, remote.AT_ONCE)

    def finish(self, unit: int, result: Mapping[str, Any]) -> None:
        """Write the marker of `unit`; call this only after everything the unit wrote is on disk.

        Raises LeaseLostError if another process has taken the build over.
        """
        self.check()
        write_record(self.marker(unit), {"unit": unit, "stage_hash": self.stage_hash, **result})

    def check(self) -> None:
        """Raise LeaseLostError if another process has taken the build over."""
        if self.lease is not None:
            self.lease.check()
        else:
            still_ours(self.folder)

    def result(self, unit: int) -> Marker:
        """Return a marker. Raises BuilderError when it is missing, damaged or of another configuration."""
        marker = read_marker(self.marker(unit))
        if (marker.get("stage_hash"), marker.get("unit")) != (self.stage_hash, unit):
            raise BuilderError(f"{marker.path} belongs to another configuration or unit: run the stage again")
        return marker

    def glance(self, unit: int) -> dict[str, float] | None:
        """Images and seconds of a finished unit, from both ends of its marker; None if it is not finished.

        The outcomes of its images between them, a hundred times as long, are neither read nor checked.
        """
        found = dict[str, str]()
        if not is_remote(self.folder):  # where a part of it takes one request too
            if not (ends := _ends_of(self.marker(unit))):
                return None
            found = _top_level(ends)
        if found.keys() >= {"images", "seconds", "stage_hash", "unit"}:
            if (found["stage_hash"], int(found["unit"])) != (self.stage_hash, unit):
                return None
            return {"images": int(found["images"]), "seconds": float(found["seconds"])}
        marker = or_none(self.result, unit)
        return None if marker is None else {name: marker[name] for name in ("images", "seconds")}


def _top_level(text: bytes) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in TOP_LEVEL.findall(text)}


def _ends_of(path: Path) -> bytes:
    """Both ends of a marker in whole lines, or all of a short one; nothing where there is none."""
    require_regular(path)
    with contextlib.suppress(OSError), path.open("rb") as file:
        head, size = file.read(HEAD_BYTES), file.seek(0, os.SEEK_END)
        if size > HEAD_BYTES + TAIL_BYTES:
            head = head[: head.rfind(b"\n") + 1]
            file.seek(-TAIL_BYTES, os.SEEK_END)
        else:
            file.seek(len(head))
        return head + file.read()
    return b""


class Marker(dict[str, Any]):
    """The fields of a marker; one that is not there is damage and no KeyError."""

    path: Path

    def __missing__(self, name: str) -> Any:
        raise VerificationError(f"{self.path} has no {name}, so it is damaged: {repair_of(self.path)}")


REOPENED = "reopened"
"""Takes the place of the stage hash in the marker of a unit that is done again, but for the rows that stay."""


def rewrite_marker(path: Path, content: Mapping[str, Any]) -> None:
    """Write a marker with other fields; one without a seal, of an earlier release, gets none: nobody checked it."""
    (write_record if "format_version" in content else write_json)(path, content)


def read_marker(path: Path) -> Marker:
    """Read the marker of any configuration. Raises BuilderError when it is missing or damaged."""
    marker = Marker(read_record(path))
    marker.path = path
    if marker.get("format_version", 1) not in (1, RECORD_VERSION):
        raise BuilderError(
            f"{path} has format version {marker['format_version']}, expected 1 to {RECORD_VERSION}"
        )
    return marker


def read_manifest(folder: BuildFolder) -> dict[str, Any]:
    """Return the manifest of a build, or an empty one. Raises BuilderError for another format version."""
    try:
        return check_manifest(folder.manifest)
    except MissingFileError:
        return {"format_version": RECORD_VERSION, "stages": {}}


def check_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest or its copy. Raises BuilderError when it is missing, damaged or of another format version."""
    manifest = read_record(path)
    version = manifest.get("format_version")
    if version not in range(1, RECORD_VERSION + 1):
        raise BuilderError(
            f"{path} has format version {version}, this release reads 1 to {RECORD_VERSION}: "
            "use the release that wrote it, or build again into another folder"
        )
    with decoding(path):
        entries = manifest["stages"].items()
        changed = [stage for stage, entry in entries if entry["hash"] != hash_of(stage, entry["inputs"])]
    if changed:
        raise VerificationError(
            f"{path} is damaged: the inputs of {', '.join(changed)} do not have the hash that is stored with them: "
            f"{repair_of(path)}"
        )
    return manifest


def write_manifest(folder: BuildFolder, manifest: Mapping[str, Any]) -> None:
    """Write the manifest and its copy. Raises LeaseLostError if another process has taken the build over."""
    still_ours(folder.root)
    write_record(folder.manifest, manifest)
    write_record(folder.manifest_copy, manifest)


def stage_entry(folder: BuildFolder, stage: str) -> dict[str, Any]:
    """Return the manifest's entry of `stage`. Raises BuilderError naming the command to run if there is none."""
    entries = recorded_stages(folder)
    if stage not in entries:
        raise BuilderError(
            f"{folder.root} has no {stage} stage yet: run `hierarchy-builder {VERBS[stage]} {folder.root}` first"
        )
    return entries[stage]


def recorded_stages(folder: BuildFolder) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries by stage; for a fused build also those that its three stages would have alone."""
    entries = dict(read_manifest(folder)["stages"])
    fused = entries.get("fuse", {"inputs": {}})
    for stage, inputs in fused["inputs"].items():
        own = {"inputs": inputs, "hash": hash_of(stage, inputs), "request": fused["request"][stage]}
        entries[stage] = {**fused, **own}
    return entries


def is_fused(folder: BuildFolder) -> bool:
    """Whether this is a fused build, which has shards but no stores."""
    return "fuse" in read_manifest(folder)["stages"]


def open_ledger(folder: BuildFolder, stage: str) -> Ledger:
    """Open the ledger of a stage that is in the manifest.

    `covariance` is recorded there as part of `extract`; the units of a fused build tell of its extraction.
    """
    if stage == "extract" and is_fused(folder):
        stage = "fuse"
    recorded_as = "extract" if stage == "covariance" else stage
    return Ledger(folder.ledger(stage), stage_entry(folder, recorded_as)["hash"])


def begin_stage(
    folder: BuildFolder,
    stage: str,
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    fresh: bool,
    repairs: bool = False,
    records: ImageTable | None = None,
) -> Ledger:
    """Record the inputs of a stage before it starts; if it has started already, check that they are the same.

    inputs: everything that decides the result. facts: what is recorded but does not, such as the path of the images.
    fresh: first remove this stage and those after it. records: the images as listed now, to tell which ones differ.
    If the store of the stage is missing, its units are run again. Other inputs are accepted if no unit is finished, but
    not where the build is being repaired: what is left of it was made from the recorded ones.
    Raises ConfigMismatchError listing the keys that differ, UsageError if files that no stage made are where this one
    writes.
    """
    manifest = read_manifest(folder)
    known = {path for one in _begun(folder, manifest) for path in outputs_of(folder, one)}
    outputs = [path for path in outputs_of(folder, stage) if path not in known]
    folder.refuse_foreign(path for place in outputs for path in folder.own_files(place))
    starts_over = fresh and stage in ("extract", "fuse")
    if not starts_over and manifest["stages"] and ("fuse" in manifest["stages"]) != (stage == "fuse"):
        made, now = ("in stages", "fused") if stage == "fuse" else ("fused", "in stages")
        raise ConfigMismatchError(
            f"{folder.root} was built {made} and cannot be continued {now}: repeat the command that made it, choose "
            "another --out, or start over with --fresh"
        )
    if fresh:
        _forget(folder, manifest, _stages_from(stage))
    markers, *others = outputs_of(folder, stage)
    if not all(path.exists() for path in others[: NUM_STORES.get(stage, 0)]):
        folder.remove(markers)
    stored = manifest["stages"].get(stage)
    if stored is not None and stored["inputs"] != dict(inputs):
        if repairs or folder.markers(stage):
            raise ConfigMismatchError(_describe_mismatch(folder, stage, stored["inputs"], inputs, records))
        _forget(folder, manifest, [stage])
        stored = None
    code_version = __version__ if stored is None else stored.get("code_version", __version__)
    return _record(folder, manifest, stage, inputs, {**facts, "code_version": code_version})


def removed_by_fresh(folder: BuildFolder, stage: str) -> list[Path]:
    """Return those files and folders that `begin_stage(…, fresh=True)` would remove and that exist, without markers."""
    manifest = read_manifest(folder)
    if "fuse" in manifest["stages"] and stage not in ("extract", "fuse"):
        return []  # refused: a fused build has no stores to go on from
    begun = _begun(folder, manifest)
    places = [path for one in _stages_from(stage) if one in begun for path in outputs_of(folder, one)]
    ledgers = folder.manifest_copy.parent
    return [
        path for path in dict.fromkeys(places) if folder.own_files(path) and not path.is_relative_to(ledgers)
    ]


def _stages_from(stage: str) -> Sequence[str]:
    """Return a stage and all later ones; `extract` and `fuse` start the whole build over."""
    if stage in ("extract", "fuse"):
        return STAGES
    return STAGES[STAGES.index(stage) : STAGES.index("fuse")]


def with_licence(folder: BuildFolder, config: ShardConfig, *, fresh: bool) -> ShardConfig:
    """The config with the licence that was given before, unless another is given now or the shards start over."""
    told = {} if fresh else recorded_stages(folder).get("shard", {}).get("request", {})
    return config if config.licence is not None else replace(config, licence=told.get("licence"))


def hash_of(stage: str, inputs: Mapping[str, Any]) -> str:
    """Return the hash that the markers of a stage with these inputs hold."""
    return config_hash({"stage": stage, "format_version": FORMAT_VERSION, **inputs})


def replace_regions(folder: BuildFolder, inputs: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Record other inputs of `cluster` whose regions are computed, and remove the links of the former parts.

    Shards of the former regions are kept; the stage `shard` refuses to continue them without --fresh.
    """
    manifest = read_manifest(folder)
    _forget(folder, manifest, ["link"])
    _record(folder, manifest, "cluster", inputs, {**facts, "code_version": __version__})


def _record(
    folder: BuildFolder,
    manifest: dict[str, Any],
    stage: str,
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Ledger:
    stage_hash = hash_of(stage, inputs)
    manifest["stages"][stage] = {"inputs": dict(inputs), "hash": stage_hash, **facts}
    write_manifest(folder, manifest)
    return Ledger(folder.ledger(stage), stage_hash)


def _begun(folder: BuildFolder, manifest: Mapping[str, Any]) -> set[str]:
    """Return the stages that have started, from the manifest and the markers; without a manifest from its copy."""
    copy = folder.manifest_copy
    kept = check_manifest(copy)["stages"] if not folder.manifest.exists() and copy.exists() else {}
    return {*manifest["stages"], *kept, *(stage for stage in STAGES if folder.markers(stage))}


def outputs_of(folder: BuildFolder, stage: str) -> list[Path]:
    """Return the folder of the markers of a stage, then the files and folders that it writes, the largest first."""
    lists = [folder.listing, folder.index, folder.class_map]
    outputs = {
        "extract": [folder.features, *lists],
        "vocabulary": [folder.vocabulary, folder.vocabulary_work],
        "cluster": [folder.regions, folder.recut, folder.ledger("recut")],
        "link": [folder.regions / "prototypes", folder.regions / "prototype_distances"],
        "shard": [folder.shards],
        "fuse": [folder.shards, folder.parts, *lists, folder.ledger("shard")],
    }
    return [folder.ledger(stage), *outputs[stage]]


def _forget(folder: BuildFolder, manifest: dict[str, Any], stages: Sequence[str]) -> None:
    """Remove what these stages made, if they have started, and their entries in the manifest."""
    for stage in (stage for stage in STAGES if stage in stages and stage in _begun(folder, manifest)):
        inputs = manifest["stages"].get(stage, {}).get("inputs", {})
        split = inputs.get("shard", inputs).get("config", {}).get("split")  # begins the names of its tars
        for path in outputs_of(folder, stage):
            folder.remove(path, split)
    for stage in stages:
        manifest["stages"].pop(stage, None)
    write_manifest(folder, manifest)


def _describe_mismatch(
    folder: BuildFolder,
    stage: str,
    stored: Mapping[str, Any],
    asked: Mapping[str, Any],
    records: ImageTable | None,
) -> str:
    has_grown = stage == "extract" and asked.get("num_images", 0) > stored.get("num_images", 0)
    is_stale = stage == "shard" and stored.get("config") == asked.get("config")
    lines = [
        f"  {difference(name, before, now)}" for name, before, now in differences(dict(stored), dict(asked))
    ]
    if records is not None and folder.listing.exists():
        with contextlib.suppress(BuilderError):
            changes = describe_changes(read_images(folder.listing), records)
            lines += [f"  images: {changes}"] if changes else []
    if stage in ("extract", "fuse"):
        again = "start over with --fresh"
    elif is_stale:
        again = f"make it again as it was: {again_command(folder, stage)}"
    else:
        again = (
            f"start over with the flags you want: hierarchy-builder {VERBS[stage]} {folder.root} … --fresh"
        )
    return (
        f"{folder.root} was made with another {stage} configuration or input:\n"
        + "\n".join(lines)
        + ("\nappend the new images with --accept-new-files" if has_grown else "")
        + f"\nrepeat the command with the stored values, choose another folder, or {again}"
    )


def again_command(folder: BuildFolder, stage: str) -> str:
    """Return the command that makes a stage again, with the options it was made with."""
    words = ["hierarchy-builder", *VERBS[stage].split(), str(folder.root)]
    if stage == "shard":
        asked = to_mapping(from_mapping(ShardConfig, stage_entry(folder, stage)["request"], stage))
        usual = to_mapping(ShardConfig())
        for name in (name for name, value in asked.items() if value != usual[name]):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if asked[name] is True else [flag, str(asked[name])]
    return shlex.join([*words, "--fresh", "--yes"])


def differences(
    stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name in sorted(stored.keys() | asked.keys()):
        before, now = stored.get(name), asked.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append((prefix + name, before, now))
    return found
