"""Nothing on disk is trusted: what was changed is found before it is used, and nothing wrong is copied further."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_flips import Flips, make_builds
from pictures import draw_picture, encoded
from typer.testing import CliRunner

from hierarchy_builder.cli.app import app
from hierarchy_builder.errors import UserError
from hierarchy_builder.files.whole import read_json, read_record, write_json
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.verify.checks import find_problems


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_builds(root)
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "now")
    return tmp_path / "now"


def call(*words: object, code: int = 0) -> str:
    """Everything that a command says; its error ends it with exit code `code`."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    error = done.exception
    if error is not None and not isinstance(error, UserError | SystemExit):
        raise error
    found = error.exit_code if isinstance(error, UserError) else done.exit_code
    said = f"{done.output}{done.stderr}{error or ''}"
    assert found == code, f"{words}: {found}\n{said}"
    return said


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content, path
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    "name",
    [
        *("staged/features.zarr/zarr.json", "staged/features.zarr/status/zarr.json", "staged/vocabulary.npz"),
        *("staged/regions.zarr/merges/c/0/0/0", "staged/ledger/cluster/000000.json", "staged/index.parquet"),
        *("staged/shards/statistics.npz", "staged/shards/train-000000.tar", "fused/parts/000000.npz"),
    ],
)
def test_a_pipe_in_place_of_a_file_is_found_and_not_waited_for(place: Path, name: str) -> None:
    (place / name).unlink()
    os.mkfifo(place / name)
    assert find_problems(BuildFolder(place / name.partition("/")[0]))


def chunk(store: Path, name: str) -> Path:
    return next(path for path in sorted((store / name / "c").rglob("*")) if path.is_file())


IN_PROCESS = ("--workers", "0", "--quiet")
SMALL = ("--encoder", "dct", "--block-rows", "4", "--samples-per-shard", "4", "--images", *IN_PROCESS)


def test_every_kind_of_file_is_checked(made: Path) -> None:
    """A few bits of each kind; `make drill` flips 20,000."""
    for name, flips in (("staged", 40), ("fused", 200)):
        outcomes = list(Flips(BuildFolder(made / name), random.Random(1)).run(flips))
        assert {kind for kind, outcome in outcomes if outcome == "found"} >= {"manifest.json", "marker"}


def test_a_bit_of_the_manifest_is_not_copied_into_shards(place: Path) -> None:
    folder = BuildFolder(place / "staged")
    before = (folder.shards / "index.json").read_bytes()
    change(folder.manifest, b'"num_classes": 3', b'"num_classes": 7')
    call("verify", folder.root, code=4)
    call("repair", folder.root, *IN_PROCESS)
    call("verify", folder.root)
    assert (folder.shards / "index.json").read_bytes() == before


def test_a_bit_of_an_unsealed_manifest_is_found_by_its_hash(place: Path) -> None:
    folder = BuildFolder(place / "staged")
    for path in (folder.manifest, folder.manifest_copy):
        write_json(path, {**read_record(path), "format_version": 1})
    assert list(find_problems(folder)) == []
    before = folder.manifest.read_bytes()
    change(folder.manifest, b'"num_classes": 3', b'"num_classes": 7')
    call("verify", folder.root, code=4)
    call("repair", folder.root, *IN_PROCESS)
    assert folder.manifest.read_bytes() == before
    change(folder.manifest, b'"batch_size": 4', b'"batch_size": 5')  # of the request, which has no hash
    assert "extract.request.batch_size" in call("repair", folder.root, *IN_PROCESS, code=4)


def test_a_bit_of_a_marker_is_not_copied_into_the_index(place: Path) -> None:
    for name, stage in (("staged", "extract"), ("fused", "fuse")):
        folder = BuildFolder(place / name)
        before = {tar.name: tar.read_bytes() for tar in folder.shards.iterdir()}
        change(folder.ledger(stage) / "000001.json", b'"width": 96', b'"width": 86')
        call("verify", folder.root, code=4)
        call("repair", folder.root, *IN_PROCESS)
        call("verify", folder.root)
        assert {tar.name: tar.read_bytes() for tar in folder.shards.iterdir()} == before


def test_the_outcome_of_an_unsealed_marker_is_looked_at_again(place: Path) -> None:
    folder = BuildFolder(place / "staged")
    before = read_index(folder.index)
    for path in folder.markers("extract"):
        unsealed = {
            name: value
            for name, value in read_record(path).items()
            if name not in ("format_version", "files")
        }
        write_json(path, unsealed)
    assert list(find_problems(folder)) == []
    change(folder.ledger("extract") / "000000.json", b'"width": 96', b'"width": 86')
    call("repair", folder.root, *IN_PROCESS)
    call("verify", folder.root)
    assert read_index(folder.index).equals(before)


@pytest.mark.parametrize("name", ["listing", "index"])
def test_a_class_name_in_a_table_is_not_copied(place: Path, name: str) -> None:
    folder = BuildFolder(place / "staged")
    before = read_index(folder.index)
    path = getattr(folder, name)
    table = pq.read_table(path)
    names = [text.replace("circle", "curcle") for text in table.column("class_name").to_pylist()]
    field = table.schema.get_field_index("class_name")
    pq.write_table(table.set_column(field, table.schema.field(field), pa.array(names)), path)
    call("verify", folder.root, code=4)
    call("repair", folder.root, *IN_PROCESS)
    call("verify", folder.root)
    assert read_index(folder.index).equals(before)
    assert {
        sample.metadata["class_name"] for tar in folder.shards.glob("*.tar") for sample in read_shard(tar)
    } == {
        "circle",
        "square",
        "stripes",
    }


@pytest.mark.parametrize("array", ["features", "status", "block_mean"])
def test_an_emptied_chunk_of_features_stops_the_next_step(place: Path, array: str) -> None:
    folder = BuildFolder(place / "staged")
    chunk(folder.features, array).write_bytes(b"")
    step = ["shard", folder.root, "--samples-per-shard", "4", "--fresh", "--yes", *IN_PROCESS]
    if array == "status":
        step = ["cluster", folder.root, "--recipe", "stable", "--fresh", "--yes", *IN_PROCESS]
    said = call(*step, code=4)
    assert "repair" in said
    call("repair", folder.root, *IN_PROCESS)
    call(*step)


def test_a_bit_of_a_part_between_kill_and_resume_is_not_copied(place: Path) -> None:
    whole, folder = BuildFolder(place / "fused"), BuildFolder(place / "again")
    words = ["build", place / "photos", "--out", folder.root, *SMALL, "--fused", "--covariance"]
    call(*words)
    for path in (*folder.shards.iterdir(), *folder.markers("shard")):
        path.unlink()
    part = folder.part(0)
    part.parent.mkdir(exist_ok=True)
    shutil.copy(whole.shards / "train-000000.tar", part)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    call(*words)
    for tar in whole.shards.glob("*.tar"):
        assert tar.read_bytes() == (folder.shards / tar.name).read_bytes()


def repaint(root: Path) -> Path:
    """Change a photograph, but not the size of its file."""
    path = root / "photos" / "circle" / "000.png"
    size = path.stat().st_size
    content = next(
        data for seed in range(50, 90) if len(data := encoded(draw_picture("circle", seed, (60, 50)))) <= size
    )
    path.write_bytes(content + bytes(size - len(content)))
    return path


def test_a_photograph_that_changed_at_equal_size_is_named_by_every_step(place: Path) -> None:
    for name, flags in (
        ("staged", ["--vocabulary", "2,4", "--covariance"]),
        ("fused", ["--fused", "--covariance"]),
    ):
        root = place / name
        repaint(place)
        assert "circle/000.png" in call("verify", root, code=4)
        assert "0 problems repaired" in " ".join(call("repair", root, *IN_PROCESS).split())
        assert "circle/000.png" in call("build", place / "photos", "--out", root, *SMALL, *flags, code=5)
    again = [
        "shard",
        place / "staged",
        "--images",
        "--samples-per-shard",
        "3",
        "--fresh",
        "--yes",
        *IN_PROCESS,
    ]
    assert "circle/000.png" in call(*again, code=5)
    assert (place / "staged" / "shards" / "_SUCCESS").is_file()  # said before --fresh removed anything
    added = encoded(draw_picture("square", 30))
    (place / "photos" / "square" / "030.png").write_bytes(added)
    accept = ["build", place / "photos", "--out", place / "staged", *SMALL, "--accept-new-files"]
    assert "circle/000.png" in call(*accept, code=5)


def test_the_advice_after_a_recut_can_be_followed(place: Path) -> None:
    root = place / "staged"
    call("cluster", root, "--recut", "0.7,0.4", *IN_PROCESS)
    said = call("verify", root, code=4)
    assert "run `hierarchy-builder repair" not in said
    (command,) = re.findall(r"run `hierarchy-builder (shard [^`]+)`", said)
    repaired = call("repair", root, "--workers", "0")
    # The terminal may fold the line inside of a path.
    assert "".join(command.split()) in "".join(repaired.split())
    refused = call("shard", root, *IN_PROCESS, code=5)
    assert command in refused
    call(*shlex.split(command), *IN_PROCESS)
    call("verify", root)
    assert read_json(root / "shards" / "index.json")["members"].count("jpg") == 1


def test_an_unfinished_build_names_the_next_step_of_every_command(place: Path) -> None:
    root = place / "staged"
    marker = root / "ledger" / "extract" / "000000.json"
    marker.unlink()
    for words in (["report", root], ["compare", root, root], ["shard", root], ["cluster", root]):
        assert f"run `hierarchy-builder extract {root}` again" in call(*words, code=1)
    (place / "photos").rename(place / "moved")
    assert "repeat the `build` command with the place" in call("repair", root, *IN_PROCESS, code=2)
    (place / "moved").rename(place / "photos")
    call("extract", root, *IN_PROCESS)
    assert marker.is_file()


def test_the_advice_for_pages_of_a_fused_build_can_be_followed(place: Path) -> None:
    for words in (["report", place / "fused"], ["compare", place / "fused", place / "staged"]):
        said = call(*words, code=1)
        assert "build without --fused in another folder" in said
    call("build", place / "photos", "--out", place / "other", *SMALL)
    call("compare", place / "other", place / "staged")
    call("report", place / "other", "--samples", "2")


def test_fresh_names_what_goes_and_waits_for_yes(place: Path) -> None:
    root = place / "staged"
    words = ["build", place / "photos", "--out", root, *SMALL, "--fresh"]
    said = call(*words, code=2)
    assert "--fresh would remove 6 finished samples" in said
    assert re.search(r"features\.zarr \([\d,]+ bytes\)", said)
    assert (root / "shards" / "_SUCCESS").exists()
    assert (root / "features.zarr").exists()


def test_only_files_of_the_set_are_published(place: Path) -> None:
    shards = place / "staged" / "shards"
    (shards / "notes.txt").write_text("mine")
    (shards / "photo.jpg").write_bytes(b"mine")
    call("publish", place / "staged", place / "away")
    assert {path.name for path in (place / "away").iterdir()} == {path.name for path in shards.iterdir()} - {
        "notes.txt",
        "photo.jpg",
    }


def test_a_changed_tar_is_not_published(place: Path) -> None:
    tar = place / "staged" / "shards" / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 2
    tar.write_bytes(content)
    assert "repair" in call("publish", place / "staged", place / "away", code=4)


def test_a_report_replaces_no_page_but_its_own(place: Path) -> None:
    root = place / "staged"
    call("report", root, "--samples", "2")
    call("report", root, "--samples", "2")
    (root / "report.html").write_text("<p>mine</p>")
    assert "--out" in call("report", root, "--samples", "2", code=2)
    assert (root / "report.html").read_text() == "<p>mine</p>"
    call("report", root, "--samples", "2", "--out", root / "report.html")
