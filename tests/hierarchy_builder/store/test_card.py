"""The dataset card: its licence and classes, the members of a sample, and a snippet that runs."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_builds import PLAN, session

from hierarchy_builder.build.pipeline import shard
from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.whole import read_json
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import MARKS, BuildFolder
from hierarchy_builder.store.shard_set import card_of, write_success
from hierarchy_builder.verify.checks import find_problems
from hierarchy_builder.verify.repair import repair


def test_the_card_tells_licence_classes_and_members(tiny_build) -> None:
    index = read_json(tiny_build.shards / "index.json")
    ids = read_json(tiny_build.shards / "class_map.json")
    card = card_of(index, ids)
    assert (tiny_build.shards / "README.md").read_text(encoding="utf-8") == card
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "unknown"
    assert set(re.findall(r"^\| `(\S+)` \|", card, re.MULTILINE)) == set(index["members"])
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0]) == {id: name for name, id in ids.items()}
    assert "<details>" not in card
    assert "order of text" not in card

    given = card_of({**index, "licence": "cc-by-4.0"}, {str(number): number for number in range(30)})
    assert yaml.safe_load(given.split("---")[1])["license"] == "cc-by-4.0"
    assert "<details><summary>30 classes</summary>" in given
    assert "order of text" in card_of(index, {"1": 0, "10": 1, "2": 2})


def test_the_snippet_of_the_card_reads_a_sample(tiny_build, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_json(tiny_build.shards / "index.json")
    monkeypatch.chdir(tiny_build.shards)
    found: dict[str, object] = {}
    exec(card_of(index, {}).split("```python")[1].split("```")[0], found)
    assert np.shape(found["features"]) == (*index["grid"], index["width"])
    assert found["label"] in range(index["num_classes"])


def test_a_licence_can_be_given_to_finished_shards(tiny_build, tmp_path: Path) -> None:
    shutil.copytree(tiny_build.root, tmp_path / "build")
    folder = BuildFolder(tmp_path / "build")
    summary = shard(folder, dataclasses.replace(PLAN.shard, licence="cc-by-4.0"), session())
    assert summary.new_images == 0
    assert "license: cc-by-4.0" in (folder.shards / "README.md").read_text(encoding="utf-8")
    shard(folder, PLAN.shard, session())
    assert "license: cc-by-4.0" in (folder.shards / "README.md").read_text(encoding="utf-8"), "kept"
    assert list(find_problems(folder)) == []
    shard(folder, dataclasses.replace(PLAN.shard, licence="unknown"), session())
    assert "license: unknown" in (folder.shards / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="expected a name on one line"):
        ShardConfig(licence="two\nlines")


def test_files_of_others_beside_the_tars_stay_and_are_not_published(tiny_build, tmp_path: Path) -> None:
    shutil.copytree(tiny_build.root, tmp_path / "build")
    folder = BuildFolder(tmp_path / "build")
    own = {folder.shards / name for name in MARKS}
    assert own <= {*folder.own_files(folder.shards)}
    theirs = {folder.shards / "preview.png": b"mine", folder.shards / "croissant.json": b'{"name": "mine"}'}
    for path, content in theirs.items():
        path.write_bytes(content)
    shard(folder, dataclasses.replace(PLAN.shard, licence="cc-by-4.0"), session())
    assert list(find_problems(folder)) == []
    publish_to(folder, str(tmp_path / "there"), Reporter(quiet=True))
    assert not {path.name for path in (tmp_path / "there").iterdir()} & MARKS.keys()
    shard(folder, dataclasses.replace(PLAN.shard, samples_per_shard=2), session(fresh=True))
    assert {path: path.read_bytes() for path in theirs} == theirs

    for path in theirs:
        path.unlink()
    shard(folder, PLAN.shard, session(fresh=True))
    (tmp_path / "there" / "preview.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"holds preview\.png, which no build published"):
        publish_to(folder, str(tmp_path / "there"), Reporter(quiet=True))


def test_files_that_lost_their_mark_are_written_again(tiny_build, tmp_path: Path) -> None:
    shutil.copytree(tiny_build.root, tmp_path / "build")
    folder = BuildFolder(tmp_path / "build")
    whole = {name: (folder.shards / name).read_bytes() for name in MARKS}
    damaged = {name: whole[name].replace(mark, mark[:-2] + b"?" + mark[-1:]) for name, mark in MARKS.items()}
    for name, content in damaged.items():
        (folder.shards / name).write_bytes(content)
    assert len(repair(folder, session())) == len(MARKS)
    assert {name: (folder.shards / name).read_bytes() for name in MARKS} == whole
    assert {name: (folder.shards / f"found-{name}").read_bytes() for name in MARKS} == damaged
    assert list(find_problems(folder)) == []


def test_a_card_in_the_words_of_another_release_is_not_damage(tiny_build, tmp_path: Path) -> None:
    shutil.copytree(tiny_build.root, tmp_path / "build")
    folder = BuildFolder(tmp_path / "build")
    card = folder.shards / "README.md"
    card.write_text(
        card.read_text(encoding="utf-8").replace("Reading it", "How it is read"), encoding="utf-8"
    )
    assert any("README.md was changed" in line for line in find_problems(folder))
    write_success(folder.shards, read_json(folder.shards / "index.json")["num_samples"])
    assert list(find_problems(folder)) == []
