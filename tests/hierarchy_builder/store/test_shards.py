"""Sample → tar → sample is identity, equal samples give equal bytes, and other readers agree."""

import hashlib
import io
import json
import tarfile

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.records import Sample
from hierarchy_builder.store.shards import (
    TarWriter,
    decode_sample,
    encode_sample,
    read_shard,
    sample_bytes,
    sidecar,
    write_shard,
)


def make_sample(key: str, seed: int = 0, **changes) -> Sample:
    random = np.random.default_rng(seed)
    values = {
        "key": key,
        "label": seed,
        "features": random.normal(size=(4, 4, 8)).astype(np.float16),
        "regions": random.integers(0, 3, (3, 4, 4)).astype(np.uint8),
        "metadata": {"path": f"{key}.jpg", "class_name": "ünïcode"},
        "image": b"\xff\xd8 not decoded here",
    }
    return Sample(**{**values, **changes})


def assert_equal(left: Sample, right: Sample) -> None:
    assert (left.key, left.label, left.metadata, left.image) == (
        right.key,
        right.label,
        right.metadata,
        right.image,
    )
    for name in ("features", "regions", "scale", "canvases"):
        first, second = getattr(left, name), getattr(right, name)
        assert (first is None) == (second is None)
        if first is not None:
            assert first.dtype == second.dtype
            np.testing.assert_array_equal(first, second)


@settings(max_examples=30, deadline=None)
@given(
    features=arrays.arrays(np.float16, (2, 3, 4), elements=st.floats(-1000, 1000, width=16)),
    regions=arrays.arrays(np.uint8, (2, 2, 3)),
    label=st.integers(0, 10_000),
    metadata=st.dictionaries(
        st.text(max_size=8), st.text(max_size=8) | st.integers() | st.none(), max_size=4
    ),
)
def test_members_round_trip(features, regions, label, metadata) -> None:
    sample = Sample(key="a/b", label=label, features=features, regions=regions, metadata=metadata)
    assert_equal(decode_sample("a/b", encode_sample(sample)), sample)


def test_tar_round_trip(tmp_path) -> None:
    samples = [make_sample(f"class/{n:03d}", n) for n in range(5)]
    facts = write_shard(tmp_path / "train-000000.tar", samples, config_hash="abc")
    for written, read in zip(samples, read_shard(tmp_path / "train-000000.tar"), strict=True):
        assert_equal(written, read)
    assert facts == json.loads(sidecar(tmp_path / "train-000000.tar").read_text())
    assert facts["bytes"] == (tmp_path / "train-000000.tar").stat().st_size


def test_equal_samples_give_equal_bytes(tmp_path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [make_sample("x/y", 1)], config_hash="")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in archive} == {(0, 0, 0, "")}


def test_webdataset_reads_what_we_write(tmp_path) -> None:
    samples = [make_sample(f"class/{n:03d}", n) for n in range(3)]
    write_shard(tmp_path / "train-000000.tar", samples, config_hash="")
    stream = webdataset.WebDataset(str(tmp_path / "train-{000000..000000}.tar"), shardshuffle=False).decode()
    read = list(stream)
    assert [item["__key__"] for item in read] == [sample.key for sample in samples]
    np.testing.assert_array_equal(read[1]["features.npy"], samples[1].features)
    assert read[2]["cls"] == 2


def test_failed_sample_leaves_no_file(tmp_path) -> None:
    def failing():
        yield make_sample("a/b")
        raise BuilderError("boom")

    with pytest.raises(BuilderError, match="boom"):
        write_shard(tmp_path / "train-000000.tar", failing(), config_hash="")
    assert list(tmp_path.iterdir()) == []


def test_repeated_key_is_refused(tmp_path) -> None:
    with pytest.raises(BuilderError, match="key a/b occurs twice"):
        write_shard(tmp_path / "train-000000.tar", [make_sample("a/b"), make_sample("a/b")], config_hash="")


def test_damage_is_named(tmp_path) -> None:
    tar = tmp_path / "train-000000.tar"
    write_shard(tar, [make_sample(f"c/{n}") for n in range(4)], config_hash="")
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2 - 700])
    with pytest.raises(BuilderError, match=r"train-000000\.tar|sample c/"):
        list(read_shard(tar))
    with pytest.raises(BuilderError, match=r"has no features\.npy, found cls"):
        decode_sample("a/b", {"cls": b"1"})


def test_pickled_arrays_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    members = encode_sample(make_sample("a/b")) | {"features.npy": buffer.getvalue()}
    with pytest.raises(BuilderError, match="damaged"):
        decode_sample("a/b", members)


def test_predicted_size_of_a_sample_is_the_size_in_the_tar(tmp_path) -> None:
    samples = [make_sample(f"c/{n}", n, image=None) for n in range(40)]
    facts = write_shard(tmp_path / "train-000000.tar", samples, config_hash="")
    predicted = sample_bytes(ShardConfig(), {"grid": (4, 4), "width": 8, "image_size_px": 64}, 4)
    assert abs(facts["bytes"] - 40 * predicted) <= 0.02 * facts["bytes"] + 10_240


KEYS = st.lists(st.text("aé中_", min_size=1, max_size=70), min_size=1, max_size=2).map("/".join)


@given(names=st.lists(KEYS, min_size=1, max_size=4, unique=True))
def test_tars_have_the_bytes_webdataset_writes(names: list[str]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    writer = TarWriter(ours)
    with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="", group="", mode=0o444) as reference:
        for number, key in enumerate(names):
            members = {"npy": bytes(700 * number), "cls": b"3", "json": b"{}"}
            writer.add(key, members)
            reference.write({"__key__": key, **members})
    facts = writer.close()
    assert ours.getvalue() == theirs.getvalue()
    assert facts["bytes"] == len(ours.getvalue())
    assert facts["sha256"] == hashlib.sha256(ours.getvalue()).hexdigest()
