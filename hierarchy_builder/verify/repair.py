"""Mend what verify finds: take back the markers of damaged units, do these again, derive anew what is derived.

A unit gives the same bytes again, so nothing after it has to be done over. Where it does not (a photograph that can
no longer be read, another machine's arithmetic), what was made from it is taken back too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hierarchy_builder.build.clustering import cluster, link, vocabulary
from hierarchy_builder.build.extraction import extract
from hierarchy_builder.build.fused import fuse_again
from hierarchy_builder.build.pipeline import shard, sum_covariance
from hierarchy_builder.build.session import Session
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import BuilderError, VerificationError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files import read_json, write_bytes, write_json
from hierarchy_builder.images.sources import listing_hash
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.damage import MANIFEST, Damage
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, records_of, write_index
from hierarchy_builder.store.ledger import Ledger, check_manifest, is_fused, stage_entry
from hierarchy_builder.store.units import layout_of, stage_units
from hierarchy_builder.verify.checks import find_damage

ROUNDS = 8
"""Times verify is asked again: what lies behind damage shows once that is mended."""

ORDER = ("extract", "covariance", "vocabulary", "cluster", "link", "shard")
"""Stages and the sums beside them, in the order of the data."""

AFTER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "extract": (("covariance", "cluster"), ("vocabulary", "link", "shard")),
    "vocabulary": ((), ("link", "shard")),
    "cluster": (("link",), ("shard",)),
    "link": ((), ("shard",)),
}
"""What follows from a unit of each stage: units of the same number, and stages as a whole."""


def repair(folder: BuildFolder, session: Session) -> list[Damage]:
    """Mend everything verify finds in a build; returns what was found.

    Raises VerificationError naming what could not be mended, and whatever a stage raises that is done again.
    """
    folder.remove_leftovers()
    found: list[Damage] = []
    for _ in range(ROUNDS):
        damages = [damage for damage in find_damage(folder) if not damage.is_stale]
        if not damages:
            return found
        for damage in damages:
            session.reporter.say(damage.text)
        found += damages
        _mend(folder, damages, session)
    raise VerificationError(
        f"{folder.root}: {len(damages)} problems are still there after {ROUNDS} repairs, the first is: "
        f"{damages[0].text}; start its stage over with --fresh"
    )


def _mend(folder: BuildFolder, damages: Iterable[Damage], session: Session) -> None:
    """Mend the first stage that is damaged, and those after it as far as they are."""
    by_stage: dict[str, set[int | None]] = {}
    for damage in damages:
        by_stage.setdefault(damage.stage, set()).add(damage.unit)
    if MANIFEST in by_stage:
        _restore_manifest(folder)
        return
    if is_fused(folder):
        _restore_listing(folder)
        for damage in damages:
            if damage.unit is not None:
                folder.remove(Ledger(folder.ledger(damage.stage), "").marker(damage.unit))
        fuse_again(folder, session)
        return
    for stage in (name for name in ORDER if name in by_stage):
        units = {unit for unit in by_stage[stage] if unit is not None}
        path, layout = layout_of(folder, stage)
        if layout and path.exists():
            stores.mend_layout(path, layout)
        if stage == "extract":
            _restore_listing(folder)
        before = _take_back(folder, stage, units)
        try:
            if stage != "extract" or units or not _rewrite_index(folder):
                _do_again(folder, stage, session)
        finally:
            _take_back_changed(folder, stage, before)


def _restore_manifest(folder: BuildFolder) -> None:
    try:
        check_manifest(folder.manifest_copy)
    except BuilderError as error:
        raise VerificationError(
            f"{folder.manifest} is damaged, and so is its copy ({error}): remove both and repeat the command that "
            "made the build; units that are done are kept"
        ) from None
    write_bytes(folder.manifest, folder.manifest_copy.read_bytes())


def _restore_listing(folder: BuildFolder) -> None:
    """Bring the class map back from the manifest, and listing and index from one another where one is whole."""
    entry = stage_entry(folder, "extract")
    if "class_map" in entry:
        write_json(folder.class_map, entry["class_map"])
    whole = [path for path in (folder.listing, folder.index) if _is_listing(path, entry)]
    if whole and folder.listing not in whole:
        write_index(folder.listing, records_of(read_index(folder.index)))
    for path in {folder.listing, folder.index}.difference(whole, [folder.listing] if whole else []):
        folder.remove(path)


def _is_listing(path: Any, entry: Mapping[str, Any]) -> bool:
    try:
        return listing_hash(records_of(read_index(path))) == entry["inputs"]["listing_hash"]
    except (BuilderError, ValueError):
        return False


def _rewrite_index(folder: BuildFolder) -> bool:
    """Write the index from the listing and the markers, where they are all there."""
    ledger = Ledger(folder.ledger("extract"), stage_entry(folder, "extract")["hash"])
    units = [unit.number for unit in stage_units(folder, "extract")]
    if not folder.listing.exists() or not all(ledger.is_done(unit) for unit in units):
        return False
    outcomes = [row for result in ledger.results(units) for row in result["outcomes"]]
    write_index(folder.index, records_of(read_index(folder.listing)), outcomes)
    return True


def _take_back(folder: BuildFolder, stage: str, units: set[int]) -> dict[int, Any]:
    """Remove the markers of `units`; returns what each unit had written, by its SHA-256."""
    existing = [unit for unit in stage_units(folder, _units_of(stage)) if unit.number in units]
    before = {unit.number: _written(folder, stage, unit) for unit in existing}
    for number in units:
        folder.remove(Ledger(folder.ledger(stage), "").marker(number))
    return before


def _units_of(stage: str) -> str:
    return "extract" if stage == "covariance" else stage


def _written(folder: BuildFolder, stage: str, unit: Block) -> Any:
    """SHA-256 of what a unit wrote, from its marker; where that is gone, of what is there now."""
    path, layout = layout_of(folder, stage)
    try:
        marker = read_json(Ledger(folder.ledger(stage), "").marker(unit.number))
        return marker["digests"] if layout else marker["sha256"]
    except (BuilderError, KeyError):
        pass
    try:
        return {name: stores.read_written(path, unit, name)[1] for name in layout} or None
    except BuilderError:
        return None


def _take_back_changed(folder: BuildFolder, stage: str, before: Mapping[int, Any]) -> None:
    """Where a unit wrote something else than before, what follows from it is to do again."""
    units = [unit for unit in stage_units(folder, _units_of(stage)) if unit.number in before]
    changed = [unit.number for unit in units if before[unit.number] != _written(folder, stage, unit)]
    if not changed or stage not in AFTER:
        return
    by_block, whole = AFTER[stage]
    for name in by_block:
        for number in changed:
            folder.remove(Ledger(folder.ledger(name), "").marker(number))
    for name in whole:
        folder.remove(folder.ledger(name))
    if "vocabulary" in whole:
        folder.remove(folder.vocabulary_work)


def _do_again(folder: BuildFolder, stage: str, session: Session) -> None:
    """Run a stage as the manifest says it was asked for; only units without a marker are done."""
    entry = stage_entry(folder, _units_of(stage))
    request: Callable[[type[Any]], Any] = lambda cls: from_mapping(cls, entry["request"], stage)  # noqa: E731
    if stage == "extract":
        extract(folder, None, request(ExtractConfig), session)
    elif stage == "covariance":
        sum_covariance(folder, entry["hash"], session)
    elif stage == "vocabulary":
        vocabulary(folder, request(VocabularyConfig), session)
    elif stage == "cluster":
        cluster(folder, request(HierarchyRecipe), session)
    elif stage == "link":
        link(folder, session)
    else:
        shard(folder, request(ShardConfig), session)
