"""Verify finds damage of every kind, and repair restores every byte."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import cli
from onnx_models import save_onnx
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build import stages
from hierarchy_builder.build.clustering import recut
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.errors import ConfigMismatchError, TooManySkippedError, UsageError, VerificationError
from hierarchy_builder.files.whole import read_json, read_record, sha256_file, write_json, write_record
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index, write_index
from hierarchy_builder.store.ledger import Ledger, write_manifest
from hierarchy_builder.store.shards import read_shard, write_shard
from hierarchy_builder.verify.checks import find_damage, find_problems
from hierarchy_builder.verify.repair import repair

PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=8, batch_size=4),
    hierarchy=HierarchyRecipe.paper(),
    vocabulary=VocabularyConfig(sizes=(2, 5), sampled_tokens=2000, iterations=4),
    shard=ShardConfig(samples_per_shard=5, images=True, canvases=True, covariance=True),
)
SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
SECOND = Block(number=1, start=8, stop=16)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undamaged")
    photos = write_tree(root / "photos", per_class=6)
    steps.build(BuildFolder(root / "build"), str(photos), PLAN, SESSION)
    return root


@pytest.fixture
def folder(undamaged: Path, tmp_path: Path) -> BuildFolder:
    shutil.copytree(undamaged, tmp_path / "copy")
    return BuildFolder(tmp_path / "copy" / "build")


def contents(folder: BuildFolder) -> dict[str, object]:
    """Bytes of every file; of markers all but the seconds they took."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.root.rglob("*") if path.is_file() and path.name != ".lock"):
        name = str(path.relative_to(folder.root))
        found[name] = path.read_bytes()
        if name.startswith("ledger/") and path.suffix == ".json":
            found[name] = {key: value for key, value in read_json(path).items() if key != "seconds"}
    return found


# Ways to do damage


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    path.write_bytes(content)


def cut(path: Path, kept: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])


def change_json(path: Path, **changes: object) -> None:
    write_json(path, {**read_json(path), **changes})


def change_marker(path: Path, **changes: object) -> None:
    """Other fields, with a seal that fits them."""
    write_record(path, {**read_record(path), **changes})


def chunk(store: Path, name: str, number: int = 2) -> Path:
    place = store / name / "c" / str(number)
    return place if place.is_file() else next(path for path in place.rglob("*") if path.is_file())


def swap_blocks(folder: BuildFolder) -> None:
    first, second = (folder.features / "features" / "c" / number for number in "01")
    shutil.move(first, folder.root / "aside")
    shutil.move(second, first)
    shutil.move(folder.root / "aside", second)


def overwrite(store: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other values, with checksums that fit them."""
    stores.write_block(store, SECOND, {name: change(stores.read_block(store, name, SECOND))})


def relabel(folder: BuildFolder) -> None:
    """Another label, with a checksum that fits it."""
    table = read_index(folder.index)
    records = list(ImageTable(table))
    records[3] = replace(records[3], label=(records[3].label + 1) % 3)
    write_index(folder.index, records, table)


def other_reason(folder: BuildFolder) -> None:
    table = read_index(folder.index)
    place = table.schema.get_field_index("reason")
    because = table.set_column(place, "reason", [["because"] * len(table)])
    write_index(folder.index, ImageTable(table), because)


def forge_tar(folder: BuildFolder, number: int = 1) -> None:
    """Replace a sample by another one, and forge every hash next to the tar to match."""
    tar = folder.shards / f"train-{number:06d}.tar"
    samples = list(read_shard(tar))
    samples[1].features = samples[0].features
    facts = write_shard(tar, samples, config_hash=read_json(tar.with_suffix(".json"))["config_hash"])
    change_marker(folder.ledger("shard") / f"{number:06d}.json", **facts)
    index = read_json(folder.shards / "index.json")
    index["shardlist"][number]["sha256"] = facts["sha256"]
    write_json(folder.shards / "index.json", index)
    change_json(folder.shards / "_SUCCESS", index_sha256=sha256_file(folder.shards / "index.json"))


def forge_canvases(folder: BuildFolder) -> None:
    tar = folder.shards / "train-000000.tar"
    samples = list(read_shard(tar))
    samples[0].canvases = samples[0].canvases + np.float16(1)
    facts = write_shard(tar, samples, config_hash=read_json(tar.with_suffix(".json"))["config_hash"])
    change_marker(folder.ledger("shard") / "000000.json", **facts)


def add_member(folder: BuildFolder) -> None:
    with tarfile.open(folder.shards / "train-000002.tar", "a") as tar:
        info = tarfile.TarInfo("../outside.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))


def other_mean(folder: BuildFolder) -> None:
    path = folder.shards / "statistics.npz"
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    arrays["mean"] = arrays["mean"] + 1e-3
    np.savez(path, allow_pickle=False, **arrays)


DAMAGE: dict[str, tuple[Callable[[BuildFolder], object], str]] = {
    "manifest cut": (lambda f: cut(f.manifest), "manifest.json is damaged"),
    "manifest gone": (lambda f: f.manifest.unlink(), "manifest.json is missing"),
    "listing cut": (lambda f: cut(f.listing), "listing.parquet is damaged"),
    "index cut": (lambda f: cut(f.index), "index.parquet is damaged"),
    "index gone": (lambda f: f.index.unlink(), "index.parquet is missing"),
    "label in the index": (relabel, "index.parquet is not the listing"),
    "outcome in the index": (other_reason, "outcomes differ"),
    "class map": (lambda f: f.class_map.write_text('{"circle": 0}'), "class_map.json is not the class map"),
    "class map torn": (lambda f: cut(f.class_map), "class_map.json is damaged"),
    "features flipped": (lambda f: flip(chunk(f.features, "features"), 0.3), "rows are damaged"),
    "features cut": (lambda f: cut(chunk(f.features, "features")), "rows are damaged"),
    "features lost": (lambda f: chunk(f.features, "features").unlink(), "features are not those"),
    "features swapped": (swap_blocks, "features are not those"),
    "features changed": (
        lambda f: overwrite(f.features, "features", lambda x: x + np.float16(0.5)),
        "features are not those",
    ),
    "status": (lambda f: overwrite(f.features, "status", lambda x: 3 - x), "status differs"),
    "moments": (lambda f: flip(chunk(f.features, "block_mean"), 0.4), "rows are damaged"),
    "scatter": (lambda f: chunk(f.features, "block_scatter").unlink(), "block_scatter are not those"),
    "store description": (lambda f: (f.features / "zarr.json").unlink(), "zarr.json is not as it was made"),
    "array description": (lambda f: cut(f.regions / "merges" / "zarr.json"), "zarr.json is not as it was"),
    "array type": (
        lambda f: change_json(f.regions / "flags" / "zarr.json", fill_value=1),
        "zarr.json is not as it was made",
    ),
    "features store gone": (lambda f: shutil.rmtree(f.features), "features.zarr"),
    "regions flipped": (lambda f: flip(chunk(f.regions, "regions"), 0.3), "rows are damaged"),
    "regions not nested": (
        lambda f: overwrite(f.regions, "regions", lambda x: x[:, ::-1]),
        "not dense or not nested",
    ),
    "regions of other images": (
        lambda f: overwrite(f.regions, "regions", lambda x: x[::-1]),
        "regions are not those",
    ),
    "merges": (lambda f: overwrite(f.regions, "merges", lambda x: x * 0.5), "merges are not those"),
    "flags": (lambda f: overwrite(f.regions, "flags", lambda x: x + 1), "flags are not those"),
    "scores": (lambda f: cut(chunk(f.regions, "scores")), "rows are damaged"),
    "regions store gone": (lambda f: shutil.rmtree(f.regions), "regions.zarr"),
    "vocabulary flipped": (lambda f: flip(f.vocabulary), "vocabulary.npz"),
    "vocabulary gone": (lambda f: f.vocabulary.unlink(), "vocabulary.npz"),
    "prototypes": (
        lambda f: overwrite(f.regions, "prototypes", lambda x: x * 0 + 3),
        "prototypes without a distance",
    ),
    "distances": (lambda f: cut(chunk(f.regions, "prototype_distances")), "rows are damaged"),
    "tar flipped": (lambda f: flip(f.shards / "train-000001.tar"), "train-000001.tar: sha256"),
    "tar cut": (lambda f: cut(f.shards / "train-000001.tar"), "not a whole tar"),
    "tar gone": (lambda f: (f.shards / "train-000003.tar").unlink(), "train-000003.tar is missing"),
    "tars swapped": (
        lambda f: shutil.copy(f.shards / "train-000000.tar", f.shards / "train-000001.tar"),
        "occurs twice in the set",
    ),
    "tar forged": (forge_tar, "features.npy differ from what the stores give"),
    "canvases forged": (forge_canvases, "canvases.npy differ from what the stores give"),
    "member outside": (add_member, "is not as it was written"),
    "tar not in the index": (
        lambda f: shutil.copy(f.shards / "train-000000.tar", f.shards / "train-000004.tar"),
        "train-000004.tar is not in index.json",
    ),
    "sidecar": (lambda f: change_json(f.shards / "train-000002.json", count=7), "belongs to another tar"),
    "index of the shards": (
        lambda f: change_json(f.shards / "index.json", num_samples=17),
        "num_samples differ",
    ),
    "index of the shards torn": (lambda f: cut(f.shards / "index.json"), "index.json is damaged"),
    "class map of the shards": (lambda f: cut(f.shards / "class_map.json"), "class_map.json is damaged"),
    "statistics": (other_mean, "mean differ from those of the features"),
    "statistics torn": (lambda f: cut(f.shards / "statistics.npz"), "statistics.npz is damaged"),
    "card": (lambda f: (f.shards / "README.md").write_text("# Mine"), "README.md was changed"),
    "croissant.json gone": (lambda f: (f.shards / "croissant.json").unlink(), "croissant.json was changed"),
    "vocabulary of the shards": (lambda f: flip(f.shards / "vocabulary.npz"), "is not the vocabulary"),
    "last marker gone": (lambda f: (f.shards / "_SUCCESS").unlink(), "_SUCCESS is missing"),
    "last marker torn": (lambda f: cut(f.shards / "_SUCCESS"), "_SUCCESS is damaged"),
    "marker torn": (lambda f: cut(f.ledger("extract") / "000001.json"), "is damaged or belongs to another"),
    "marker gone": (
        lambda f: (f.ledger("cluster") / "000002.json").unlink(),
        "cluster has done 2 of 3 units",
    ),
    "marker of another run": (
        lambda f: change_marker(f.ledger("shard") / "000000.json", stage_hash="0" * 64),
        "belongs to another configuration",
    ),
    "marker of nothing": (
        lambda f: shutil.copy(f.ledger("link") / "000000.json", f.ledger("link") / "000009.json"),
        "is the marker of a unit that link does not have",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_repair_restores_every_byte_after_damage(folder: BuildFolder, kind: str) -> None:
    before = contents(folder)
    plant, text = DAMAGE[kind]
    plant(folder)
    found = [damage.text for damage in repair(folder, SESSION)]  # what verify says, until it says nothing
    assert [line for line in found if text in line], found
    assert contents(folder) == before


def test_repair_runs_only_damaged_units(folder: BuildFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[tuple[str, int]]()
    perform = stages.perform

    def count(stage: stages.Stage, unit: Block, threads: int, ledger: Ledger) -> dict[str, object]:
        done.append((ledger.folder.name, unit.number))
        return perform(stage, unit, threads, ledger)

    monkeypatch.setattr("hierarchy_builder.build.workers.perform", count)
    flip(chunk(folder.features, "features", 1), 0.3)
    flip(folder.shards / "train-000002.tar")
    repair(folder, SESSION)
    assert done == [("extract", 1), ("shard", 2)]


def test_repair_redoes_later_stages_if_an_image_was_lost(folder: BuildFolder) -> None:
    key = lose_an_image(folder)
    with pytest.raises(TooManySkippedError, match=r"1 of 18 images could not be used"):
        repair(folder, SESSION)
    allow_losses(folder)
    repair(folder, SESSION)
    keys = {sample.key for tar in folder.shards.glob("*.tar") for sample in read_shard(tar)}
    assert len(keys) == 17
    assert key not in keys
    assert tars_of(folder) == tars_without_it(folder)


def test_a_repair_that_was_killed_leaves_word_of_what_it_began(
    folder: BuildFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    lose_an_image(folder)
    allow_losses(folder)
    with monkeypatch.context() as patched:
        patched.setattr("hierarchy_builder.verify.repair._remove_later", die)
        with pytest.raises(KeyboardInterrupt):
            repair(folder, SESSION)
    assert any("000001.begun is left of a repair" in text for text in find_problems(folder))
    repair(folder, SESSION)
    assert tars_of(folder) == tars_without_it(folder)
    assert not list(find_problems(folder))


def lose_an_image(folder: BuildFolder) -> str:
    """Overwrite a photograph with zeros and cut its features, so that its unit writes something else; its key."""
    row = pq.read_table(folder.index).to_pylist()[9]
    photo = folder.root.parent / "photos" / row["path"]
    photo.write_bytes(bytes(photo.stat().st_size))
    cut(chunk(folder.features, "features", 1))
    return str(row["key"])


def allow_losses(folder: BuildFolder) -> None:
    entry = read_json(folder.manifest)
    entry["stages"]["extract"]["request"]["max_bad_fraction"] = 0.1
    write_manifest(folder, entry)


def tars_without_it(folder: BuildFolder) -> dict[str, bytes]:
    """Those of a new build of the photographs as they are now."""
    whole = BuildFolder(folder.root.parent / "whole")
    lenient = replace(PLAN, extract=replace(PLAN.extract, max_bad_fraction=0.1))
    steps.build(whole, str(folder.root.parent / "photos"), lenient, SESSION)
    return tars_of(whole)


def test_a_repair_that_cannot_begin_keeps_what_is_whole(folder: BuildFolder) -> None:
    before = contents(folder)
    photo = folder.root.parent / "photos" / pq.read_table(folder.index).to_pylist()[9]["path"]
    photo.rename(folder.root / "away")
    flip(chunk(folder.features, "features", 1))
    with pytest.raises(ConfigMismatchError, match=rf"images: 1 is gone \(\w+/{photo.name}\)"):
        repair(folder, SESSION)
    for stage in ("cluster", "link", "shard"):
        assert folder.markers(stage), stage
    (folder.root / "away").rename(photo)
    repair(folder, SESSION)
    assert contents(folder) == before


def tars_of(folder: BuildFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.shards.glob("*.tar")}


def test_repair_refuses_a_build_without_any_manifest(folder: BuildFolder) -> None:
    cut(folder.manifest)
    cut(folder.manifest_copy)
    with pytest.raises(
        VerificationError, match=r"and so is its copy.*repeat the command that made the build"
    ):
        repair(folder, SESSION)
    folder.manifest.unlink()
    folder.manifest_copy.unlink()
    with pytest.raises(UsageError, match="is not a build"):
        repair(folder, SESSION)
    steps.build(folder, str(folder.root.parent / "photos"), PLAN, SESSION)
    assert list(find_problems(folder)) == []


def test_repair_restores_index_and_listing_from_the_images(folder: BuildFolder) -> None:
    before = contents(folder)
    cut(folder.index)
    cut(folder.listing)
    repair(folder, SESSION)
    assert contents(folder) == before


def test_repair_removes_temporary_files_of_killed_runs(folder: BuildFolder) -> None:
    before = contents(folder)
    (folder.shards / "train-000001.tar.tmp-77").write_bytes(b"half")
    (folder.features / "features" / "c" / ".0.77.partial").write_bytes(b"half")
    repair(folder, SESSION)
    assert contents(folder) == before


def test_repair_leaves_an_outdated_stage_as_it_is(folder: BuildFolder) -> None:
    recut(folder, (0.8, 0.2), SESSION)
    (stale,) = (damage for damage in find_damage(folder) if damage.stage == "shard")
    assert stale.is_stale
    assert "shard is out of date" in stale.text
    assert repair(folder, SESSION) == []


def test_repair_takes_an_encoder_that_lies_elsewhere_now(tmp_path: Path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=1)
    (tmp_path / "moved").mkdir()
    model, other = (
        save_onnx(tmp_path / folder / "m.onnx", {"late": 64}, size=32, doc=folder)
        for folder in (".", "moved")
    )
    folder = BuildFolder(tmp_path / "build")
    steps.extract(folder, str(photos), ExtractConfig(encoder=f"onnx:{model}"), SESSION)
    before = contents(folder)
    next(path for path in folder.features.rglob("features/c/**/0") if path.is_file()).unlink()
    new = tmp_path / "new" / "m.onnx"
    new.parent.mkdir()
    model.rename(new)
    words = ("hierarchy-builder", "repair", folder.root, "--workers", "0", "--quiet")
    refused = cli(*words)
    assert refused.code == 2
    assert "that file is not there: give its new place, --encoder onnx:FILE" in refused.err
    wrong = cli(*words, "--encoder", f"onnx:{other}")
    assert wrong.code == 5
    assert "weights_hash" in wrong.err
    assert cli(*words, "--encoder", f"onnx:{new}").code == 0
    assert not list(find_problems(folder))
    assert {name for name, data in contents(folder).items() if data != before[name]} <= {
        "manifest.json",
        "ledger/manifest.json",
    }


@pytest.mark.parametrize(
    ("name", "words"), [("manifest.json", ("status",)), ("class_map.json", ("extract", "--workers", "0"))]
)
def test_the_advice_of_a_verb_works(folder: BuildFolder, name: str, words: tuple[str, ...]) -> None:
    (folder.root / name).unlink()
    verb, *options = words
    refused = cli("hierarchy-builder", verb, folder.root, *options)
    assert refused.code == 4
    assert f"run `hierarchy-builder repair {folder.root}`" in refused.err
    assert cli("hierarchy-builder", "repair", folder.root).code == 0
    assert cli("hierarchy-builder", verb, folder.root, *options).code == 0
