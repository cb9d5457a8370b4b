"""Builds of parts of a listing: disjoint, complete, with the keys, classes and bytes of the whole build."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import cli
from tiny_builds import PLAN, session

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard

PARTS = ("1/3", "2/3", "3/3")


def samples_of(folder: BuildFolder) -> dict[str, tuple[int, bytes, bytes, object]]:
    """Key → label, features, regions and metadata of every sample."""
    found = {}
    for tar in sorted(folder.shards.glob("*.tar")):
        for sample in read_shard(tar):
            found[sample.key] = (
                sample.label,
                sample.features.tobytes(),
                sample.regions.tobytes(),
                sample.metadata,
            )
    return found


def part_plan(text: str | None) -> steps.BuildPlan:
    extract = ExtractConfig(encoder="dct", block_rows=8, batch_size=4, partition=text)
    return dataclasses.replace(PLAN, extract=extract, vocabulary=None)


def test_partitions_are_disjoint_and_complete(tmp_path: Path) -> None:
    lines = [f"{name}/{n}.{suffix},{name}" for name in "abc" for n in range(40) for suffix in ("jpg", "png")]
    listing = tmp_path / "list.csv"
    listing.write_text("path,class\n" + "\n".join(lines) + "\n")
    for name in "abc":
        (tmp_path / name).mkdir()
        for n in range(40):
            (tmp_path / f"{name}/{n}.jpg").write_bytes(b"x" * n)
    whole = open_source(str(listing))
    parts = [open_source(str(listing), partition=text) for text in PARTS]
    assert all(part.class_map == whole.class_map for part in parts)
    records = [record for part in parts for record in part.records]
    assert sorted(records, key=lambda each: each.path) == list(whole.records)
    assert min(len(part.records) for part in parts) > 40
    # x.jpg and x.png share a plain key, so they are in one part and told apart as in the whole
    assert all(len({r.path[:-4] for r in part.records}) * 2 == len(part.records) for part in parts)


def test_a_union_of_partitions_holds_the_samples_of_the_whole_build(
    tiny_photos: Path, tmp_path: Path
) -> None:
    whole = BuildFolder(tmp_path / "whole")
    steps.build(whole, str(tiny_photos), part_plan(None), session())
    parts = [BuildFolder(tmp_path / f"part-{text[0]}") for text in PARTS]
    for number, (folder, text) in enumerate(zip(parts, PARTS, strict=True)):
        steps.build(folder, str(tiny_photos), part_plan(text), session(), fused=number == 2)
    from trainer.data.reader import ShardReader
    from trainer.data.shards import open_index

    union, single = open_index(str(tmp_path / "part-*")), open_index(whole.root)
    assert union.num_samples == single.num_samples == sum(len(samples_of(folder)) for folder in parts)
    assert {key: each for folder in parts for key, each in samples_of(folder).items()} == samples_of(whole)
    found = [ShardReader(index).read_rows(range(index.num_samples)) for index in (union, single)]
    labels = [sorted(zip(rows.keys, rows.label.tolist(), strict=True)) for rows in found]
    assert labels[0] == labels[1]
    manifest = json.loads(parts[0].manifest.read_text())
    assert manifest["stages"]["extract"]["inputs"]["config"]["partition"] == "1/3"
    looked = cli("hierarchy-builder", "status", *(folder.root for folder in parts[:2]), "--json").json
    assert {(row["build"], row["state"]) for row in looked} == {(str(f.root), "done") for f in parts[:2]}
    assert cli("hierarchy-builder", "verify", parts[0].root, parts[2].root, "--json").json == {"problems": []}
    (parts[2].shards / "README.md").write_text("another card")
    ended = cli("hierarchy-builder", "verify", parts[0].root, parts[2].root)
    assert ended.code == 4
    assert f"{parts[2].root}: found 2 problems" in ended.err
    with pytest.raises(ConfigMismatchError, match=r"config\.partition: '1/3' there, '2/3' now"):
        steps.build(parts[0], str(tiny_photos), part_plan("2/3"), session())


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/x", "01/3", "1/9999999", ""])
def test_what_is_no_partition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected K/N with K from 1 to N"):
        from_mapping(ExtractConfig, {"partition": text}, "extract")


def test_an_empty_partition_is_refused(tiny_photos: Path) -> None:
    with pytest.raises(BuilderError, match=r"partition 1/1000 holds none of the 18 images"):
        open_source(str(tiny_photos), partition="1/1000")
