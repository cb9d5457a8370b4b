"""What a build refuses to mix, and what it leaves alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import cli
from pictures import write_tree
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli.app import app
from hierarchy_builder.cli.options import resolve_recipe
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.errors import (
    BuilderError,
    ConfigMismatchError,
    UsageError,
    UserError,
    VerificationError,
)
from hierarchy_builder.files.whole import read_json
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import begin_stage, check_manifest, read_manifest
from trainer.cli.app import app as trainer_app

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))


IN_PROCESS = ("--workers", "0", "--quiet")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder, folders included."""
    places = [folder, *folder.rglob("*")]
    return {str(place): (place.stat().st_size, place.stat().st_mtime_ns) for place in places}


def test_the_manifest_says_what_decides_the_result(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=1), BuildFolder(tmp_path / "build")
    steps.extract(folder, str(photos), ExtractConfig(encoder="dct"), SESSION)
    entry = read_manifest(folder)["stages"]["extract"]
    assert {"config", "encoder", "listing_hash", "num_images"} <= entry["inputs"].keys()
    assert len(entry["hash"]) == len(entry["inputs"]["listing_hash"]) == 64
    assert entry["inputs"]["encoder"]["weights_hash"]
    assert len(entry["probe"]) == 12
    assert entry["code_version"]
    assert check_manifest(folder.manifest_copy) == read_manifest(folder)


def test_other_weights_are_refused_side_by_side(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=1), BuildFolder(tmp_path / "build")
    first = ExtractConfig(encoder="dinov2-reg-small", weights="random:0")
    steps.extract(folder, str(photos), first, SESSION)
    there = read_json(folder.manifest)["stages"]["extract"]["inputs"]["encoder"]["weights_hash"]
    with pytest.raises(ConfigMismatchError) as caught:
        steps.extract(
            folder, str(photos), ExtractConfig(encoder="dinov2-reg-small", weights="random:1"), SESSION
        )
    (line,) = [line for line in str(caught.value).splitlines() if "weights_hash" in line]
    assert f"encoder.weights_hash: '{there}' there, '" in line
    assert caught.value.exit_code == 5


def test_the_second_driver_is_told_at_once(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=1), BuildFolder(tmp_path / "build")
    with folder.locked():
        line = (*(sys.executable, "-m", "hierarchy_builder.cli", "build", photos), "--out", folder.root)
        second = subprocess.run(
            [*line, "--encoder", "dct", *IN_PROCESS], capture_output=True, text=True, timeout=120
        )
    assert second.returncode == 1
    assert (
        "is being written by another process: wait until it has ended; `hierarchy-builder status "
        f"{folder.root}` shows how far it is" in second.stderr
    )
    assert not folder.manifest.exists()


def test_a_source_that_cannot_be_written_is_enough(tmp_path: Path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=2)
    for place in [photos, *photos.rglob("*")]:
        place.chmod(0o555 if place.is_dir() else 0o444)
    before = snapshot(photos)
    out = tmp_path / "build"
    done = cli(
        "hierarchy-builder", "build", photos, "--out", out, "--encoder", "dct", "--images", *IN_PROCESS
    )
    assert done.code == 0, done.err
    assert snapshot(photos) == before


def test_verify_and_repair_on_the_command_line(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=2), BuildFolder(tmp_path / "build")
    build = ("build", photos, "--out", folder.root, "--encoder", "dct", *IN_PROCESS)
    assert cli("hierarchy-builder", *build).code == 0
    tar = folder.shards / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-20_000])
    folder.manifest.write_bytes(folder.manifest.read_bytes()[:100])
    found = cli("hierarchy-builder", "verify", folder.root, "--json")
    assert found.code == 4
    assert "manifest.json is damaged" in found.json["problems"][0]
    assert f"run `hierarchy-builder repair {folder.root}`" in found.err
    repaired = cli("hierarchy-builder", "repair", folder.root, "--json", *IN_PROCESS)
    assert repaired.code == 0, repaired.err
    assert {row["stage"] for row in repaired.json["repaired"]} == {"manifest", "shard"}
    assert tar.read_bytes() == whole


def test_a_torn_marker_is_a_unit_to_do(tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    ledger = begin_stage(folder, "shard", {"a": 1}, {}, fresh=False)
    ledger.finish(0, {"images": 3})
    ledger.marker(0).write_bytes(ledger.marker(0).read_bytes()[:9])
    assert not begin_stage(folder, "shard", {"a": 1}, {}, fresh=False).is_done(0)


def test_what_the_end_would_refuse_is_refused_at_the_start(tmp_path: Path) -> None:
    photos = write_tree(tmp_path / "photos", per_class=1)
    (tmp_path / "none").mkdir()
    out = tmp_path / "build"
    words = ["build", str(photos), "--out", str(out), "--encoder", "dct", "--workers", "0", "--quiet"]
    for flag, value, message in (
        ("--publish", "nope://bucket/set", "expected a URL of a file system that fsspec knows"),
        ("--masks", str(tmp_path / "none"), "contains no label maps"),
    ):
        with pytest.raises(BuilderError, match=message):
            CliRunner().invoke(app, [*words, flag, value], catch_exceptions=False)
    assert not (out / "features.zarr").exists()


EMPTY_PATHS = [
    (app, ["build", "PHOTOS", "--out", ""]),
    (app, ["build", "PHOTOS", "--out="]),
    (app, ["plan", "PHOTOS", "--out", ""]),
    (app, ["extract", "PHOTOS", "--out", ""]),
    (app, ["report", "DIR", "--out", ""]),
    (app, ["compare", "DIR", "DIR", "--out", ""]),
    (app, ["verify", ""]),
    (trainer_app, ["train", "SHARDS", "--out", ""]),
    (trainer_app, ["train-decoder", "SHARDS", "--out", ""]),
    (trainer_app, ["sample", "RUN", "--labels", "0", "--out="]),
    (trainer_app, ["sample", "", "--labels", "0", "--out", "samples"]),
    (trainer_app, ["report", "RUN", "--out", ""]),
    (trainer_app, ["export-official", "RUN", "--out", ""]),
    (trainer_app, ["encode", "RUN", "--out", ""]),
    (trainer_app, ["edit", "FILE", "--out", ""]),
    (trainer_app, ["compare", "FILE", "FILE", "--out", ""]),
    (trainer_app, ["sweep", "RUN", "--out", ""]),
]


@pytest.mark.parametrize(
    ("verbs", "words"), EMPTY_PATHS, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_an_empty_path_is_not_this_folder(
    verbs: typer.Typer, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out "$OUT"` of a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(verbs, words)
    assert ended.exit_code == 2
    assert "it is empty, expected a path" in " ".join(ended.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_the_level_of_label_maps_asks_for_label_maps(tmp_path: Path) -> None:
    photos, out = str(write_tree(tmp_path / "photos", per_class=1)), str(tmp_path / "build")
    with pytest.raises(UsageError, match=r"--masks-level is 1.* no --masks FOLDER names any"):
        CliRunner().invoke(app, ["build", photos, "--out", out, "--masks-level", "1"], catch_exceptions=False)
    given = {"config": None, "recipe": None, "cuts": None, "masks": None, "masks_level": 0}
    with pytest.raises(UsageError, match="--masks-level is 0"):
        resolve_recipe(given)
    assert resolve_recipe({**given, "masks": photos}).masks_level == 0
    assert resolve_recipe({**given, "masks_level": None}).masks is None
    assert not Path(out).exists()


def test_verify_leaves_a_running_build_alone(tmp_path: Path) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=1), BuildFolder(tmp_path / "build")
    steps.extract(folder, str(photos), ExtractConfig(encoder="dct"), SESSION)
    (folder.ledger("extract") / "000000.json").unlink()
    with folder.locked(), pytest.raises(BuilderError) as caught:
        CliRunner().invoke(app, ["verify", str(folder.root)], catch_exceptions=False)
    assert "being written by another process: verify it when that has ended" in str(caught.value)
    assert f"`hierarchy-builder status {folder.root}` shows" in str(caught.value)
    assert caught.value.exit_code == 1
    (folder.ledger("extract") / "000000.json").write_text("[")
    with pytest.raises(UserError, match=f"hierarchy-builder repair {folder.root}[`,]"):
        read_json(folder.ledger("extract") / "000000.json")
    with pytest.raises(VerificationError, match="hierarchy-builder repair"):
        CliRunner().invoke(app, ["verify", str(folder.root)], catch_exceptions=False)
