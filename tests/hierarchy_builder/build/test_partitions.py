"""Builds of parts of a listing: disjoint, complete, with the keys, classes and bytes of the whole build."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import cli
from tiny_builds import PLAN, session

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.config import ExtractConfig, Partition
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.images.table import Collected
from hierarchy_builder.records import ImageRecord
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
    assert cli("hierarchy-builder", "verify", parts[0].root, parts[2].root, "--json").json == [
        {"build": str(parts[number].root), "problems": []} for number in (0, 2)
    ]
    (parts[2].shards / "README.md").write_text("another card")
    ended = cli("hierarchy-builder", "verify", parts[0].root, parts[2].root)
    assert ended.code == 4
    assert f"{parts[2].shards / 'README.md'} was changed after the set was finished" in ended.out
    assert f"{parts[2].root}: found 1 problem" in ended.err
    # what is found in one build is told although another cannot be verified
    ended = cli("hierarchy-builder", "verify", parts[2].root, tmp_path / "nothing", parts[0].root, "--json")
    assert ended.code == 4
    assert [sorted(row) for row in ended.json] == [
        ["build", "problems"],
        ["build", "error", "problems"],
        ["build", "problems"],
    ]
    assert [len(row["problems"]) for row in ended.json] == [1, 0, 0]
    keys = [next(iter(samples_of(folder))) for folder in parts[:2]]
    shown = cli("hierarchy-builder", "report", *(f.root for f in parts), "--keys", ",".join(keys), "--json")
    assert shown.json == [{"build": str(f.root), "page": str(f.report)} for f in parts[:2]], shown.err
    ended = cli("hierarchy-builder", "report", *(f.root for f in parts), "--keys", f"{keys[0]},no/such")
    assert (ended.code, "none of the 3 builds has a usable image no/such" in ended.err) == (2, True)
    with pytest.raises(ConfigMismatchError, match=r"config\.partition: '1/3' there, '2/3' now"):
        steps.build(parts[0], str(tiny_photos), part_plan("2/3"), session())


def test_a_part_gives_no_key_of_another_part(tmp_path: Path) -> None:
    """Images that share a key get hashes; an image of another part can have a name that ends with that hash."""
    names = [f"cat/{n}.{suffix}" for n in range(12) for suffix in ("jpg", "png")]
    hashed = {record.key for record in parts_of(tmp_path, names, (None,))}
    clashing = [f"{key}.jpg" for key in sorted(hashed)[::2]]
    whole = parts_of(tmp_path, [*names, *clashing], (None,))
    assert len({record.key for record in whole}) == len(whole) == 36
    assert parts_of(tmp_path, [*names, *clashing], PARTS) == whole


def parts_of(folder: Path, names: Sequence[str], partitions: Sequence[str | None]) -> list[ImageRecord]:
    """The records of these partitions of a folder of empty files, in the order of their paths."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    parts = [open_source(str(folder), partition=text) for text in partitions]
    return sorted((record for part in parts for record in part.records), key=lambda each: each.path)


def test_a_part_keeps_its_own_images_and_asks_for_their_sizes_only() -> None:
    part, asked = Partition.parse("2/3"), list[str]()
    images = Collected(part)
    for number in range(300):
        key = f"cat/{number}"
        images.add(f"{key}.png", "cat", lambda key=key: len(asked.append(key) or key))
    assert asked == [f"cat/{number}" for number in range(300) if part.takes(f"cat/{number}")]
    assert images.table().column("key").to_pylist() == asked
    assert (images.total, images.elsewhere) == (300, [])


def test_a_part_without_a_file_names_one_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path\n" + "".join(f"{n}.png\n" for n in range(20)))
    own = parts_of(tmp_path / "there", [f"{n}.png" for n in range(20)], ("2/3",))
    with pytest.raises(BuilderError, match="that belong to partition 2/3, the first is") as caught:
        open_source(str(table), partition="2/3")
    assert f"none of the {len(own)} paths" in str(caught.value)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/x", "01/3", "1/9999999", ""])
def test_what_is_no_partition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected K/N with K from 1 to N"):
        from_mapping(ExtractConfig, {"partition": text}, "extract")


def test_an_empty_partition_is_refused(tiny_photos: Path) -> None:
    with pytest.raises(BuilderError, match=r"partition 1/1000 holds none of the 18 images"):
        open_source(str(tiny_photos), partition="1/1000")
