"""Several shard sets as one: their order, their statistics, what must agree, and what a run says of another list."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from command_line import SETTINGS, cli
from fixture_shards import change_index, vouch, write_shards
from tiny_runs import FLOW, LATENT, assert_same_state

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex, joined, open_index, read_statistics
from trainer.data.stream import BatchDataset, StreamPlan
from trainer.evaluation.judges import judged_on, open_judges
from trainer.methods import registry


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of other samples: set-a, set-b and set-c."""
    root = tmp_path_factory.mktemp("sets")
    for seed, (name, count, offset) in enumerate((("a", 24, 0.0), ("b", 10, 3.0), ("c", 9, -1.0))):
        write_shards(root / f"set-{name}", count, seed=seed, offset=offset)
    return root


def features_of(index: ShardIndex) -> np.ndarray:
    rows = ShardReader(index).read_rows(range(index.num_samples))
    return rows.raw_features().numpy().astype(np.float64)


def test_samples_of_all_sets_come_once_in_one_order(root: Path, tmp_path: Path) -> None:
    index = open_index([root / "set-a", root / "set-b", root / "set-c"])
    assert index.num_samples == 43
    plan = StreamPlan(shard_sizes=tuple(s.num_samples for s in index.shards), num_levels=4, batch_size=43)
    found = BatchDataset(index, plan).read(0)
    single = np.concatenate([features_of(open_index(root / f"set-{name}")) for name in "abc"])
    assert sorted(map(bytes, found.raw_features().numpy().astype(np.float64))) == sorted(map(bytes, single))
    again = open_index([str(root / "set-c"), root / "set-b", root / "set-a"])
    assert again.shards == index.shards  # however the sets are listed
    for name, moved in (("set-a", "z"), ("set-b", "y"), ("set-c", "x")):
        shutil.copytree(root / name, tmp_path / moved)
    digests = [[shard.sha256 for shard in each.shards] for each in (index, open_index(f"{tmp_path}/*"))]
    assert digests[0] == digests[1]  # and wherever they lie


def test_statistics_are_those_of_one_set_of_all_samples(root: Path) -> None:
    index = open_index(str(root / "set-*"))
    features = features_of(index)
    for names, axes in ((("channel_mean", "channel_variance"), (0, 1, 2)), (("mean", "variance"), 0)):
        mean, variance = read_statistics(index, names)
        np.testing.assert_allclose(mean, features.mean(axis=axes), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(variance, features.var(axis=axes), rtol=1e-13)


def test_sets_are_named_by_patterns_and_files(root: Path, tmp_path: Path) -> None:
    wanted = open_index([root / "set-a", root / "set-b"]).shards
    assert open_index(str(root / "set-[ab]")).shards == wanted
    lists = root / "some.txt"
    lists.write_text(f"# two of three\nset-a\n\n{root}/set-b\n")
    assert open_index(lists).shards == wanted
    lists.write_text("set-[ab]\n")
    assert open_index(lists).shards == wanted
    fsspec.filesystem("memory").pipe("/lists/some.txt", f"{root}/set-a\n".encode())
    with pytest.raises(UsageError, match="which is no place there: write the whole URL"):
        open_index("memory://lists/some.txt")
    (tmp_path / "linked-a").symlink_to(root / "set-a")
    shutil.copytree(root / "set-b", tmp_path / "linked-b")
    (tmp_path / "linked.md").touch()
    assert open_index(f"{tmp_path}/linked*").num_samples == 34
    for content, text in (("# none\n", "names no folder"), ("set-z\n", "set-z does not exist")):
        (root / "other.txt").write_text(content)
        with pytest.raises(UsageError, match=text):
            open_index(root / "other.txt")
    with pytest.raises(UsageError, match="matches no folder"):
        open_index(f"{root}/nothing-*")
    bracketed = write_shards(tmp_path / "set[1]")
    assert open_index(bracketed).num_samples == 24


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recipe": {"cuts": [0.7, 0.35]}}, r"recipe: .*0\.65.*0\.7|recipe: .*0\.7.*0\.65"),
        ({"feature_dtype": "int8"}, "feature_dtype: .*int8"),
        ({"grid": [2, 8]}, r"grid: \((4, 4|2, 8)\) in the first, \((4, 4|2, 8)\) in the second"),
    ],
)
def test_sets_that_differ_are_refused_by_name(
    change: dict[str, object], text: str, root: Path, tmp_path: Path
) -> None:
    other = write_shards(tmp_path / "other", 9, seed=7)
    change_index(other, **change)
    with pytest.raises(MismatchError, match=text) as caught:
        open_index([root / "set-a", other])
    assert str(root / "set-a") in str(caught.value)
    assert str(other) in str(caught.value)


def test_another_encoder_or_class_map_is_refused(root: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", 9, seed=7)
    encoder = json.loads((other / "index.json").read_text())["encoder"]
    change_index(other, encoder={**encoder, "weights_hash": "12ab"})
    with pytest.raises(MismatchError, match=r"encoder.*weights_hash.*'12ab'"):
        open_index([root / "set-a", other])
    (other / "class_map.json").write_text('{"bee": 0, "ant": 1, "cat": 2}')
    change_index(other, encoder=encoder)
    with pytest.raises(MismatchError, match=r"class_names.*--class-map"):
        open_index([root / "set-a", other])


def test_samples_are_not_taken_twice(root: Path) -> None:
    with pytest.raises(UsageError, match="hold the same samples: give every set once"):
        open_index([root / "set-a", root / "set-b", root / "set-a"])


def test_a_run_on_several_sets_resumes_exactly_and_refuses_another_list(root: Path, tmp_path: Path) -> None:
    sets = [str(root / name) for name in ("set-a", "set-b")]
    config = dataclasses.replace(FLOW, total_images=48, checkpoint_images=16)
    for name, parts in (("whole", [48]), ("resumed", [32, 48])):
        for images in parts:
            part = dataclasses.replace(config, total_images=images)
            # the order in which the sets are listed plays no role
            registry.train(part, sets if images == 48 else sets[::-1], str(tmp_path / name), quiet=True)
    assert_same_state(tmp_path / "whole", tmp_path / "resumed", 6)
    stored = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["shards"]["sets"]
    assert sorted((each["folder"], each["num_samples"]) for each in stored) == [("set-a", 24), ("set-b", 10)]
    forget_sets(tmp_path / "resumed")  # as an earlier release wrote it
    registry.train(config, sets, str(tmp_path / "resumed"), quiet=True)
    with pytest.raises(
        MismatchError, match=r"on 2 sets of shards, the command names 3.*\n  added: set-c \(9 s"
    ):
        registry.train(config, [*sets, str(root / "set-c")], str(tmp_path / "whole"), quiet=True)
    with pytest.raises(MismatchError, match=r"the command names 1;.*\n  missing: set-b \(10 samples"):
        registry.train(config, sets[0], str(tmp_path / "whole"), quiet=True)


def forget_sets(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    del content["shards"]["sets"]
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def test_commands_take_several_sets(root: Path, tmp_path: Path) -> None:
    sets = [root / "set-a", root / "set-b"]
    words = ("--preset", "tiny-cpu", *SETTINGS, "--batch-size", 8, "--total-images", 16)
    done = cli("trainer", "train", *sets, "--out", tmp_path, *words, "--json")
    assert (done.code, done.json["images_seen"]) == (0, 16), done.err
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["shards"]["num_samples"] == 34
    asked = [word for each in sets for word in ("--shards", each)]
    done = cli("trainer", "report", tmp_path, *asked, "--json")
    assert done.code == 0, done.err


def test_judges_of_which_some_were_trained_on_are_called_so(root: Path, tmp_path: Path) -> None:
    trained = open_index([root / "set-a", root / "set-b"]).describe()
    judges = open_judges([str(root / "set-b"), str(root / "set-c")])
    assert "of which 53% trained this run" in judged_on(trained, judges, 19)
    assert judged_on(trained, open_index(root / "set-b"), 10).startswith("Judged on the training images")
    earlier = {name: each for name, each in open_index(root / "set-a").describe().items() if name != "sets"}
    assert "of which 71% trained this run" in judged_on(
        earlier, open_judges([root / "set-a", root / "set-b"]), 34
    )
    few = write_shards(tmp_path / "few", 1, seed=9)
    known = open_index(few).describe()
    shards = tuple(dataclasses.replace(shard, num_samples=200) for shard in open_index(root / "set-a").shards)
    many = dataclasses.replace(open_index(root / "set-a"), shards=shards)
    assert "of which less than 1% trained" in judged_on(known, joined([open_index(few), many]), 1)
    assert "which are not the shards" in judged_on(trained, open_index(root / "set-c"), 9)


def test_sets_of_several_splits_judge_but_do_not_train(root: Path, tmp_path: Path) -> None:
    held_out = write_shards(tmp_path / "held-out", 9, seed=7)
    change_index(held_out, split="val")
    assert open_judges([root / "set-a", held_out]).split == "train+val"
    with pytest.raises(UsageError, match="train on sets of one split, and let the others judge") as caught:
        registry.train(FLOW, [root / "set-a", held_out], str(tmp_path / "run"), quiet=True)
    assert str(held_out) in str(caught.value)
    assert str(root / "set-a") in str(caught.value)


def test_each_set_is_compared_with_its_own_statistics(root: Path, tmp_path: Path) -> None:
    """Those of a small set hardly change the statistics of all."""
    other = write_shards(tmp_path / "other", 1, seed=7)
    path = other / "statistics.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "channel_mean": arrays["channel_mean"] + 50})
    vouch(other)
    config = dataclasses.replace(FLOW, normalise="channel")
    with pytest.raises(MismatchError, match=f"{other}/statistics.npz does not describe these features"):
        registry.train(config, [root / "set-a", root / "set-b", other], str(tmp_path / "run"), quiet=True)


def test_every_set_is_looked_at_for_pictures_before_training(tmp_path: Path) -> None:
    sets = [
        write_shards(tmp_path / name, 9, seed=n, pictures=name == "with")
        for n, name in enumerate(("with", "not"))
    ]
    with pytest.raises(TrainerError, match=rf"{tmp_path}/not/.*tar, sample .* holds no picture"):
        registry.train(LATENT, sets, str(tmp_path / "run"), quiet=True)


def test_names_of_sets_are_never_empty_nor_equal(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(root / f"set-{name}", tmp_path / name / "photos/shards")
    both = open_index([tmp_path / "a/photos", tmp_path / "b/photos"]).describe()["sets"]
    assert sorted(each["folder"] for each in both) == ["a/photos", "b/photos"]
    monkeypatch.chdir(tmp_path / "a/photos")
    assert open_index(".").describe()["sets"][0]["folder"] == "photos"
