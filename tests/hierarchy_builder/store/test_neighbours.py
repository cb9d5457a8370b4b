"""Other libraries read the shards: the same bytes through each, and metadata that catalogues accept.

docs/formats.md says which versions of which libraries were tried.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import webdataset
from PIL import Image
from tiny_builds import PLAN, digests, make, session

from hierarchy_builder.build.pipeline import shard
from hierarchy_builder.build.plan import few_tars
from hierarchy_builder.config import ShardConfig
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.verify.checks import find_damage

ABSENT = "the extra dev installs it"
ABSENT_NEIGHBOUR = "pip install -e '.[neighbours]' installs it"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    root = tmp_path_factory.mktemp("neighbours")
    for number in range(12):
        path = root / "photos" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return make(root / "build", root / "photos")


@pytest.fixture(scope="module")
def members(built: BuildFolder) -> dict[str, dict[str, bytes]]:
    """The bytes of every member, by key and name, as tarfile reads them."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(built.shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, name = info.name.partition(".")
                content = tar.extractfile(info)
                assert content is not None
                found.setdefault(key, {})[name] = content.read()
    return found


def test_webdataset_gives_the_same_bytes(built: BuildFolder, members: dict[str, dict[str, bytes]]) -> None:
    urls = sorted(map(str, built.shards.glob("*.tar")))
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert read.keys() == members.keys()
    for key, wanted in members.items():
        assert {name: read[key][name] for name in wanted} == wanted


def test_the_card_shows_a_picture_of_the_samples(built: BuildFolder) -> None:
    assert "](preview.png)" in (built.shards / "README.md").read_text(encoding="utf-8")
    with Image.open(built.shards / "preview.png") as picture:
        assert picture.width > 4 * 128
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20


def test_croissant_lists_every_tar_and_member(built: BuildFolder) -> None:
    index = json.loads((built.shards / "index.json").read_text())
    found = json.loads((built.shards / "croissant.json").read_text())
    files = [each for each in found["distribution"] if each["@type"] == "cr:FileObject"]
    assert [(each["contentUrl"], each["sha256"]) for each in files] == [
        (entry["url"], entry["sha256"]) for entry in index["shardlist"]
    ]
    sets = {each["includes"] for each in found["distribution"] if each["@type"] == "cr:FileSet"}
    assert sets == {f"*.{name}" for name in index["members"]}
    known = {each["@id"] for each in found["distribution"]}
    used = {f["source"]["fileSet"]["@id"] for table in found["recordSet"] for f in table["field"]}
    assert used <= known


def test_croissant_passes_and_gives_the_records(
    built: BuildFolder, members: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path))  # read when the module is loaded
    mlcroissant = pytest.importorskip("mlcroissant", reason=ABSENT)
    dataset = mlcroissant.Dataset(jsonld=str(built.shards / "croissant.json"))
    assert not dataset.metadata.issues.errors
    labels = {row["labels/key"]: row["labels/label"] for row in dataset.records("labels")}
    assert {text(key): text(label) for key, label in labels.items()} == {
        key: each["cls"].decode() for key, each in members.items()
    }


def test_hugging_face_datasets_gives_the_same_arrays(
    built: BuildFolder, members: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason=ABSENT)
    urls = sorted(map(str, built.shards.glob("*.tar")))
    stream = datasets.load_dataset(
        "webdataset", data_files={"train": urls}, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    read = {sample["__key__"]: sample for sample in stream}
    assert read.keys() == members.keys()
    for key, wanted in members.items():
        for name in ("features.npy", "regions.npy"):
            expected = np.load(io.BytesIO(wanted[name]))
            np.testing.assert_array_equal(np.asarray(read[key][name], expected.dtype), expected)
        assert read[key]["cls"] == int(wanted["cls"])


@pytest.mark.drill
def test_litdata_gives_the_same_bytes(
    built: BuildFolder, members: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    litdata = pytest.importorskip("litdata", reason=ABSENT_NEIGHBOUR)
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path / "cache"))
    monkeypatch.setenv("DATA_OPTIMIZER_DATA_CACHE_FOLDER", str(tmp_path / "data"))
    urls = sorted(map(str, built.shards.glob("*.tar")))
    litdata.optimize(samples_of_tar, urls, str(tmp_path / "chunks"), chunk_bytes="64MB", num_workers=1)
    read = {sample["__key__"]: sample for sample in litdata.StreamingDataset(str(tmp_path / "chunks"))}
    assert read.keys() == members.keys()
    assert all({name: read[key][name] for name in wanted} == wanted for key, wanted in members.items())


def samples_of_tar(url: str) -> Iterator[dict[str, Any]]:
    """What LitData stores of one tar: at the top of a module, since its workers look the function up."""
    for sample in webdataset.WebDataset([url], shardshuffle=False):
        yield {name: value for name, value in sample.items() if name != "__local_path__"}


@pytest.mark.drill
def test_energon_gives_the_same_bytes(
    built: BuildFolder, members: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    energon = pytest.importorskip("megatron.energon", reason=ABSENT_NEIGHBOUR)
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    class AsStored(energon.DefaultTaskEncoder):
        decoder = None
        cookers: ClassVar = [energon.Cooker(energon.stateless(lambda sample: sample))]

    names = [Path(shutil.copy(tar, tmp_path)).name for tar in sorted(built.shards.glob("*.tar"))]
    WebdatasetPreparator.prepare_dataset(
        EPath(str(tmp_path)), names, split_parts_ratio=[("train", 1.0)], tar_index_only=False, workers=1
    )
    (tmp_path / ".nv-meta/dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )
    stream = energon.get_train_dataset(
        str(tmp_path),
        worker_config=energon.WorkerConfig.default_worker_config(0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=AsStored(),
        repeat=False,
    )
    read = {sample["__key__"]: sample for sample in energon.get_loader(stream)}
    assert read.keys() == members.keys()
    assert all({name: read[key][name] for name in wanted} == wanted for key, wanted in members.items())


def test_a_licence_changes_the_metadata_and_no_tar(built: BuildFolder) -> None:
    before = digests(built.shards, "*.tar")
    config = ShardConfig(samples_per_shard=5, images=True, covariance=True, licence="cc-by-4.0")
    shard(built, config, session())
    assert digests(built.shards, "*.tar") == before
    assert json.loads((built.shards / "croissant.json").read_text())["license"] == "cc-by-4.0"
    assert list(find_damage(built)) == []
    shard(built, PLAN.shard, session())


def test_plan_advises_enough_tars_for_readers_that_share_them_out() -> None:
    (advice,) = few_tars(5, 5000)
    assert "5 tars for 5,000 samples" in advice
    assert "--samples-per-shard 250" in advice
    assert few_tars(20, 5000) == few_tars(1, 900) == []


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
