"""Repair what verify finds: remove the markers of damaged units, run these units again and rewrite what follows.

A unit normally writes the same bytes again, and later stages stay as they are. If it writes others (because an image
can no longer be read, or another machine rounds differently), repair also removes what was made from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hierarchy_builder.build.changes import finish_carrying
from hierarchy_builder.build.clustering import cluster, link, vocabulary
from hierarchy_builder.build.extraction import extract
from hierarchy_builder.build.fused import fuse_again
from hierarchy_builder.build.pipeline import shard, sum_covariance
from hierarchy_builder.build.session import Session
from hierarchy_builder.config import HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.encoders import check_stored_encoder
from hierarchy_builder.errors import UsageError, VerificationError, or_none
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files.whole import read_json, readable_json, write_bytes, write_json, write_sealed_json
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BEGUN, MARKS, BuildFolder, is_own_about
from hierarchy_builder.store.index import read_images, write_index
from hierarchy_builder.store.ledger import (
    check_manifest,
    differences,
    is_fused,
    open_ledger,
    read_marker,
    stage_entry,
)
from hierarchy_builder.store.shard_set import SUCCESS
from hierarchy_builder.store.units import gathered, layout_of, stage_units
from hierarchy_builder.terminal import counted
from hierarchy_builder.verify.checks import MANIFEST, Damage, find_damage, is_listing

ROUNDS = 8
"""How often verify and repair alternate at most: some damage is found only after other damage is repaired."""

ORDER = ("extract", "covariance", "vocabulary", "cluster", "link", "shard")
"""Stages, and the scatter matrices (`covariance`), in the order of the data."""

AFTER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "extract": (("covariance", "cluster"), ("vocabulary", "link", "shard")),
    "vocabulary": ((), ("link", "shard")),
    "cluster": (("link",), ("shard",)),
    "link": ((), ("shard",)),
}
"""What is made from a unit of each stage: units with the same number, and whole stages."""


def repair(folder: BuildFolder, session: Session) -> list[Damage]:
    """Repair everything verify finds in a build; returns what was found.

    Raises VerificationError naming what could not be repaired, and any error of a stage that runs again.
    """
    session = replace(session, repairs=True)
    folder.remove_leftovers()
    if or_none(check_manifest, folder.manifest) is not None:
        finish_carrying(folder)
    found: list[Damage] = []
    for _ in range(ROUNDS):
        seen = list(find_damage(folder))
        damages = [damage for damage in seen if not damage.is_stale]
        if not damages:
            for stale in seen:
                session.reporter.say(stale.text)
            return found
        for damage in damages:
            session.reporter.say(damage.text)
        found += damages
        _repair_round(folder, damages, session)
    raise VerificationError(
        f"{folder.root}: {counted(len(damages), 'problem')} left after {ROUNDS} repairs, the first is: "
        f"{damages[0].text}; start its stage over with --fresh"
    )


def _repair_round(folder: BuildFolder, damages: Iterable[Damage], session: Session) -> None:
    """Repair the manifest alone if it is damaged, else every damaged stage in the order of the data."""
    by_stage: dict[str, set[int | None]] = {}
    for damage in damages:
        by_stage.setdefault(damage.stage, set()).add(damage.unit)
    if MANIFEST in by_stage:
        _restore_manifest(folder)
        return
    if is_fused(folder) or "extract" in by_stage:
        _check_encoder(folder, session)
    if is_fused(folder):
        _set_aside(folder)
        _restore_listing(folder)
        for stage, numbers in by_stage.items():
            _remove_markers(folder, stage, (number for number in numbers if number is not None))
        fuse_again(folder, session)
        return
    for stage in (name for name in ORDER if name in by_stage):
        damaged = {unit for unit in by_stage[stage] if unit is not None}
        path, layout = layout_of(folder, stage)
        if layout and path.exists():
            stores.repair_layout(path, layout)
        if stage == "extract":
            _restore_listing(folder)
        units = [unit for unit in stage_units(folder, stage) if unit.number in damaged]
        before = {unit.number: _before(folder, stage, unit) for unit in units}
        _remove_markers(folder, stage, damaged)
        if stage == "shard":
            _set_aside(folder)
        try:
            if stage != "extract" or damaged or not _rewrite_index(folder):
                _run_again(folder, stage, session)
        finally:
            changed = [unit.number for unit in units if _is_changed(folder, stage, unit, before[unit.number])]
            if changed:
                _remove_later(folder, stage, changed)
            for unit in units:
                if _marked(folder, stage, unit) is not None:
                    folder.remove(_begun(folder, stage, unit))
        if changed:
            return  # what later stages lack now is found in the next round


def _check_encoder(folder: BuildFolder, session: Session) -> None:
    """Raise UsageError if the encoder of the build is a function that nobody asked to run, or a file that is gone."""
    request = stage_entry(folder, "extract")["request"]
    if "encoder" not in session.encoder_at:
        check_stored_encoder(request["encoder"], folder.root, trusted=session.trust_encoder)
    asked = session.asked_to_extract(request)
    text, weights = asked.encoder.removeprefix("onnx:"), asked.weights or ""
    if text != asked.encoder and not any(Path(each).is_file() for each in (text, text.rpartition(":")[0])):
        raise UsageError(
            f"the encoder of {folder.root} is {asked.encoder}, and that file is not there: give its new place, "
            "--encoder onnx:FILE, or onnx:FILE:OUTPUT if the name had an output; its SHA-256 is compared"
        )
    if weights and not weights.startswith("random:") and not Path(weights).exists():
        raise UsageError(
            f"the weights of the encoder of {folder.root} are {weights}, and that file is not there: give its new "
            "place, --weights FILE; its SHA-256 is compared"
        )


def _restore_manifest(folder: BuildFolder) -> None:
    """Copy the manifest over its copy, or the other way round: whichever of the two proves itself whole."""
    pair = folder.manifest, folder.manifest_copy
    found = [or_none(check_manifest, path) for path in pair]
    if found[0] is None and found[1] is None:
        raise VerificationError(
            f"{pair[0]} is damaged, and so is its copy {pair[1]}: remove both and repeat the command that made the "
            "build; finished units are kept"
        )
    if found[0] is not None and found[1] is not None and found[0]["format_version"] == 1:
        names = [name for name, _, _ in differences(found[0]["stages"], found[1]["stages"])]
        raise VerificationError(
            f"{pair[0]} and {pair[1]} differ ({', '.join(names[:5])}), and an earlier release wrote no checksum that "
            "tells which is right: repeat the command that made the build"
        )
    whole, other = pair if found[0] is not None else reversed(pair)
    write_bytes(other, whole.read_bytes())


def _restore_listing(folder: BuildFolder) -> None:
    """Restore the class map from the manifest, the listing from the index; remove damaged listings and indices."""
    entry = stage_entry(folder, "extract")
    if "class_map" in entry:
        write_json(folder.class_map, entry["class_map"])
    if not is_listing(folder.index, entry):
        folder.remove(folder.index)
    if not is_listing(folder.listing, entry):
        folder.remove(folder.listing)
        if folder.index.exists():
            write_index(folder.listing, read_images(folder.index))


def _rewrite_index(folder: BuildFolder) -> bool:
    """Write the index from the listing and the markers; returns whether all of them exist."""
    ledger, units = open_ledger(folder, "extract"), stage_units(folder, "extract")
    if not folder.listing.exists() or ledger.missing(units):
        return False
    outcomes, _ = gathered(ledger, units)
    write_index(folder.index, read_images(folder.listing), outcomes)
    return True


def _remove_markers(folder: BuildFolder, stage: str, units: Iterable[int]) -> None:
    for number in units:
        folder.remove(folder.marker(stage, number))


def _before(folder: BuildFolder, stage: str, unit: Block) -> dict[str, Any]:
    """Return the SHA-256 of what a unit wrote, `marked` and `held`; a repair that was killed left it in a file.

    Without that file nobody could tell, after a kill, that later stages were made from something else.
    """
    path = _begun(folder, stage, unit)
    if not readable_json(path):
        write_sealed_json(path, {"marked": _marked(folder, stage, unit), "held": _held(folder, stage, unit)})
    return read_json(path)


def _begun(folder: BuildFolder, stage: str, unit: Block) -> Path:
    return folder.marker(stage, unit.number).with_suffix(BEGUN)


def _marked(folder: BuildFolder, stage: str, unit: Block) -> Any:
    """Return the SHA-256 of what a unit wrote, as its marker tells; None without a whole marker."""
    marker: dict[str, Any] = or_none(read_marker, folder.marker(stage, unit.number)) or {}
    return marker.get("digests" if layout_of(folder, stage)[1] else "sha256")


def _held(folder: BuildFolder, stage: str, unit: Block) -> Any:
    """Return the SHA-256 of what a store holds for a unit now; None where that cannot be read."""
    path, layout = layout_of(folder, stage)

    def digests() -> dict[str, str]:
        group = stores.open_store(path)
        return {name: stores.read_written(group, name, unit)[1] for name in layout}

    return or_none(digests) if layout else None


def _is_changed(folder: BuildFolder, stage: str, unit: Block, before: dict[str, Any]) -> bool:
    """Whether a unit wrote something else than before, or may have: it was begun again and did not end.

    What failed before it wrote anything changed nothing.
    """
    now, held = _marked(folder, stage, unit), before["held"]
    return bool(_held(folder, stage, unit) != held if now is None else now != (before["marked"] or held))


def _remove_later(folder: BuildFolder, stage: str, changed: Iterable[int]) -> None:
    """Remove the markers of everything that was made from the changed units of a stage."""
    by_block, whole = AFTER.get(stage, ((), ()))
    for name in by_block:
        _remove_markers(folder, name, changed)
    for name in whole:
        folder.remove(folder.ledger(name))
    if "vocabulary" in whole:
        folder.remove(folder.vocabulary_work)


def _set_aside(folder: BuildFolder) -> None:
    """Keep under another name what took the place of a file of the finished set, which is then written again.

    Without its mark nobody can tell damage from a file that somebody put there.
    """
    digests = readable_json(folder.shards / SUCCESS).get("files", {})
    for path in (folder.shards / name for name in MARKS if name in digests):
        if not is_own_about(path):
            write_bytes(path.with_name(f"found-{path.name}"), path.read_bytes())
            write_bytes(path, MARKS[path.name])


def _run_again(folder: BuildFolder, stage: str, session: Session) -> None:
    """Run the units of a stage that have no marker, with the configuration in the manifest."""
    if stage == "covariance":
        return sum_covariance(folder, session)
    request = stage_entry(folder, stage).get("request", {})
    match stage:
        case "extract":
            extract(folder, None, session.asked_to_extract(request), session)
        case "vocabulary":
            vocabulary(folder, from_mapping(VocabularyConfig, request, stage), session)
        case "cluster":
            cluster(folder, from_mapping(HierarchyRecipe, request, stage), session)
        case "link":
            link(folder, session)
        case _:
            shard(folder, from_mapping(ShardConfig, request, stage), session)
