"""int8 features: a known error bound, what is stored, what the card says, and what verify refuses."""

import json
import shutil
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pictures import write_tree

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block, Sample
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.quantisation import changed_share, dequantise, measure_quantisation, quantise
from hierarchy_builder.store.shards import (
    decode_sample,
    encode_sample,
    read_shard,
    sample_bytes,
    sidecar,
    write_shard,
)
from hierarchy_builder.verify.checks import find_problems

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=8),
    hierarchy=HierarchyRecipe.paper(),
    shard=ShardConfig(samples_per_shard=7, feature_dtype="int8", canvases=True),
)


@given(arrays.arrays(np.float16, (2, 3, 5), elements=st.floats(-60000, 60000, width=16)))
def test_quantisation_error_is_at_most_half_a_step(features: np.ndarray) -> None:
    stored, scale = quantise(features)
    assert (stored.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (2, 3, 1))
    assert stored.min(initial=0) >= -127
    error = np.abs(dequantise(stored, scale) - features.astype(np.float32))
    assert (error <= scale * 0.5001).all()
    assert not dequantise(*quantise(np.zeros((1, 4), np.float16))).any()


def test_changed_share_ignores_numbering_of_regions() -> None:
    before = np.array([[[0, 0], [1, 1]], [[0, 0], [1, 1]], [[0, 0], [0, 0]]], np.uint8)
    after = np.array([[[1, 1], [0, 0]], [[0, 1], [1, 1]], [[0, 1], [2, 2]]], np.uint8)
    assert changed_share(before, after).tolist() == [0, 0.25, 0.5]


def test_a_sample_of_the_method_stays_below_200_000_bytes() -> None:
    features, scale = quantise(np.random.default_rng(0).normal(size=(16, 16, 768)).astype(np.float16))
    regions = np.zeros((3, 16, 16), np.uint8)
    metadata = {"path": "n01440764/n01440764_10026.JPEG", "flags": 0, "regions_per_level": [2, 6, 18]}
    sample = Sample(key="n/a", label=999, features=features, scale=scale, regions=regions, metadata=metadata)
    assert sum(map(len, encode_sample(sample).values())) <= 200_000


def test_predicted_size_is_the_size_in_the_tar(tmp_path: Path) -> None:
    features, scale = quantise(np.random.default_rng(0).normal(size=(4, 4, 300)))
    regions = np.zeros((3, 4, 4), np.uint8)
    samples = [
        Sample(key=f"c/{n}", label=0, features=features, scale=scale, regions=regions) for n in range(9)
    ]
    facts = write_shard(tmp_path / "train-000000.tar", samples, config_hash="")
    encoder = {"grid": (4, 4), "width": 300, "image_size_px": 64}
    predicted = sample_bytes(ShardConfig(feature_dtype="int8"), encoder, 4)
    assert 0 <= facts["bytes"] - 9 * predicted <= 10_240


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    photos = write_tree(tmp_path_factory.mktemp("photos"), per_class=4)
    folder = BuildFolder(tmp_path_factory.mktemp("int8") / "build")
    steps.build(folder, str(photos), PLAN, SESSION)
    return folder


def test_shards_hold_int8_with_their_scale(built: BuildFolder) -> None:
    assert list(find_problems(built)) == []
    features = stores.read_block(built.features, "features", Block(number=0, start=0, stop=12))
    samples = [sample for tar in sorted(built.shards.glob("*.tar")) for sample in read_shard(tar)]
    for sample, exact in zip(samples, features, strict=True):
        assert sample.scale is not None
        stored = dequantise(sample.features, sample.scale)
        assert (np.abs(stored - exact) <= sample.scale * 0.5001).all()
        canvases = level_canvases(stored.astype(np.float16)[None], sample.regions[None])[0]
        np.testing.assert_array_equal(sample.canvases, canvases)
    index = json.loads((built.shards / "index.json").read_text())
    assert index["feature_dtype"] == "int8"
    assert index["members"] == sorted(
        ["features.npy", "scale.npy", "regions.npy", "canvases.npy", "cls", "json"]
    )


def test_card_states_the_error_of_int8(built: BuildFolder) -> None:
    found = json.loads((built.shards / "index.json").read_text())["quantisation"]
    assert found["images"] == 12
    assert 0 < found["relative_error"] < 0.02
    assert found["cosine"] > 0.999
    assert len(found["tokens_changed"]) == len(found["agreement"]) == 3
    assert all(0 <= share < 0.2 for share in found["tokens_changed"])
    assert all(0.8 < index <= 1 for index in found["agreement"])
    assert found == measure_quantisation(built, PLAN.hierarchy, np.arange(12))
    card = (built.shards / "README.md").read_text()
    assert f"{found['relative_error']:.3%}" in card
    assert "| `scale.npy` | float32 [16, 16, 1]" in card
    assert yaml.safe_load(card.split("---")[1])["pretty_name"] == "Teacher hierarchies (dct)"


def test_int8_without_scale_is_refused() -> None:
    features, scale = quantise(np.ones((2, 2, 3), np.float16))
    sample = Sample(key="a/b", label=0, features=features, scale=scale, regions=np.zeros((1, 2, 2), np.uint8))
    members = encode_sample(sample)
    assert decode_sample("a/b", members).scale is not None
    del members["scale.npy"]
    with pytest.raises(BuilderError, match=r"a/b has features\.npy of int8 without scale\.npy"):
        decode_sample("a/b", members)


def test_verify_finds_negative_scales(built: BuildFolder, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "copy")
    shutil.copytree(built.root, folder.root)
    tar = folder.shards / "train-000001.tar"
    samples = list(read_shard(tar))
    assert samples[0].scale is not None
    samples[0].scale = np.full_like(samples[0].scale, -1)
    write_shard(tar, samples, config_hash=json.loads(sidecar(tar).read_text())["config_hash"])
    problems = "\n".join(find_problems(folder))
    assert f"{samples[0].key}: scales are not finite or below 0" in problems
