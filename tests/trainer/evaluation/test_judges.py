"""Which images judge a run of each method, and what terminal and page say about them and about variety."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fixture_shards import CLASS_MAP, change_index, write_shards
from tiny_runs import FLOW, LATENT, NORMALIZING
from typer.testing import CliRunner, Result

from hierarchy_builder.errors import UsageError
from trainer.cli.app import app
from trainer.data.shards import open_index
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.judges import judged_on, open_judges
from trainer.evaluation.pages import known_classes
from trainer.evaluation.sweep import SweepConfig, sweep
from trainer.evaluation.tables import VARIETY, metric_tables, variety_verdict
from trainer.methods import registry
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.pipeline import TrajectoryForcingPipeline
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

METHODS = {"trajectory-forcing": FLOW, "latent-forcing": LATENT, "normalizing-trajectory": NORMALIZING}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three splits; its class map holds a class `yak` that no image has."""
    root = tmp_path_factory.mktemp("splits")
    for seed, (split, count) in enumerate({"train": 24, "val": 18, "test": 12}.items()):
        classes = {**CLASS_MAP, "yak": len(CLASS_MAP)}
        folder = write_shards(root / split, count, seed=seed, pictures=True, class_map=classes)
        change_index(folder, split=split)
    return root


@pytest.fixture(scope="module")
def runs(splits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of each method on the split train."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in METHODS.items():
        config = dataclasses.replace(config, total_images=16, log_images=8, sample_images=None)
        registry.train(config, str(splits / "train"), str(folder / name), quiet=True)  # type: ignore[arg-type]
    return {name: folder / name for name in METHODS}


def call(*words: object) -> Result:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_a_held_out_split_is_taken_unless_another_is_asked_for(splits: Path) -> None:
    assert open_judges(str(splits)).split == "val"
    assert open_judges(str(splits), "test").split == "test"
    assert open_judges(f"{splits}/", "train").num_samples == 24
    assert open_judges(str(splits / "train")).split == "train"
    assert open_judges(str(splits / "train"), "train").split == "train"
    with pytest.raises(UsageError, match="holds shards of the split train and no folder val"):
        open_judges(str(splits / "train"), "val")


def test_an_unfinished_split_is_passed_over(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    (shards / "val").mkdir()
    assert open_judges(str(shards)).split == "train"
    with pytest.raises(UsageError, match="does not exist"):
        open_judges(str(tmp_path / "nothing"))


def test_a_sentence_says_whether_the_images_trained_the_run(splits: Path) -> None:
    train, val = (open_index(str(splits / name)) for name in ("train", "val"))
    assert judged_on(train.describe(), train, 24).startswith(
        "Judged on the training images (24 images of split train)"
    )
    said = judged_on(train.describe(), val, 1)
    assert said == "Judged on 1 image of split val, which are not the shards that trained this run."
    assert "does not say which shards" in judged_on({"encoder": {}}, val, 18)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_judged_by_its_variety(method: str, runs: dict[str, Path], splits: Path) -> None:
    run = runs[method]
    done = call("evaluate", run, "--shards", splits, "--samples-per-class", 4, "--json")
    assert "Judged on 18 images of split val" in done.stderr
    values = {row["name"]: row["value"] for row in json.loads(done.stdout)}
    levels = [name for name in values if name.startswith("variety_") and not name.endswith("_real")]
    assert len(levels) == (4 if method == "trajectory-forcing" else 1)
    # Tokens of a class are N(label − 1, 0.3²) on an object of equal place: the two halves are equally varied.
    assert values[f"{levels[-1]}_real"] == pytest.approx(1, abs=0.25)
    assert {"precision", "recall", "coverage", "coverage_real"} <= set(values)
    # The class `yak` has no images: 4 samples of each of the three others.
    assert (values["num_samples"], values["num_classes"], values["class_mean_chance"]) == (12, 3, 1 / 3)
    kept = json.loads((run / "evaluation.json").read_text())
    assert (kept["split"], kept["classes"]) == ("val", [0, 1, 2])
    call("report", run)
    page = (run / "report.html").read_text()
    assert "Samples of one class are" in page
    assert "Judged on 18 images of split val" in page
    assert "ant" in page
    assert "yak" not in page.partition("Configuration")[0].partition("Variety")[0]


def test_ids_without_images_change_no_score(tmp_path: Path) -> None:
    """One network and one set of images, in which the last class has id 2, or 19 and nothing between."""
    near = write_shards(tmp_path / "near")
    far = write_shards(tmp_path / "far", class_map={**CLASS_MAP, "cat": 19})
    config = dataclasses.replace(FLOW, total_images=64, log_images=8, sample_images=None)
    registry.train(config, str(near), str(tmp_path / "run"), quiet=True)
    pipe = TrajectoryPipeline.from_pretrained(str(tmp_path / "run"))
    weights = pipe.model.state_dict()
    table = weights["class_table"][:, [0, 1, *[0] * 17, 2, 3]]  # 3 is the null class, and 20 of the wider one
    wider = TrajectoryTransformer(dataclasses.replace(pipe.model.config, num_classes=20))
    wider.load_state_dict({**weights, "class_table": table})
    names = open_index(str(far)).class_names
    scores = [
        dict(evaluate(judged, open_index(str(folder)), samples_per_class=4))
        for folder, judged in (
            (near, pipe),
            (far, TrajectoryForcingPipeline(wider, names, pipe.encoder, normaliser=pipe.normaliser)),
        )
    ]
    assert scores[0]["num_samples"] == 12
    assert {"class_mean_accuracy", "frechet_pooled", "precision", "recall"} <= scores[0].keys()
    assert scores[0] == scores[1]


def test_every_sample_is_drawn_from_noise_of_its_own(
    runs: dict[str, Path], splits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same few noises in every class, samples of all classes differ from their means in the same way."""
    pipe = TrajectoryPipeline.from_pretrained(str(runs["trajectory-forcing"]))
    drawn: list[int] = []
    stream = pipe.stream

    def recorded(labels: Sequence[int], seeds: Sequence[int], **how: Any) -> Iterator[Trajectory]:
        drawn.extend(seeds)
        return stream(labels, seeds, **how)

    monkeypatch.setattr(pipe, "stream", recorded)
    found = dict(evaluate(pipe, open_index(str(splits / "val")), samples_per_class=2))
    assert len(drawn) == len(set(drawn)) == found["num_samples"]


def test_training_images_are_named_as_such(runs: dict[str, Path], splits: Path) -> None:
    words = ("--shards", splits, "--split", "train", "--samples-per-class", 2)
    done = call("evaluate", runs["trajectory-forcing"], *words)
    assert "Judged on the training images (24 images of split train)" in done.stderr
    assert "Samples of one class are " in " ".join(done.stdout.split())


def test_words_follow_from_the_least_level_and_from_recall() -> None:
    said = variety_verdict({"variety_0": 0.3, "variety_1": 0.02, "variety_1_real": 1.1})
    assert said == (
        "Samples of one class are nearly alike: on level 1, the least of 2, they have 0.02 of the variety of real "
        "images of their class."
    )
    words = {0.3: "much more alike", 0.7: "somewhat more alike", 1.0: "about as varied", 1.6: "more varied"}
    for ratio, expected in words.items():
        assert f"are {expected}" in variety_verdict({"variety_0": ratio})
    assert "was not measured" in variety_verdict({"precision": 1.0})
    values = {"variety_0": 0.5, "recall": 0.1, "recall_real": 0.8}
    assert list(metric_tables({"name": name, "value": value} for name, value in values.items())) == [VARIETY]
    said = variety_verdict(values)
    assert "They come near 10% of the real images (recall); as many real images come near 80%" in said


def test_a_report_shows_only_classes_with_images(runs: dict[str, Path], splits: Path, tmp_path: Path) -> None:
    pipe = TrajectoryPipeline.from_pretrained(runs["trajectory-forcing"], device="cpu")
    train = open_index(str(splits / "train"))
    assert (pipe.class_names[3], list(known_classes(tmp_path, pipe, train))) == ("yak", [0, 1, 2])
    assert list(known_classes(tmp_path, pipe)) == [0, 1, 2]
    elsewhere = dataclasses.replace(train, url="s3://bucket/train")
    assert list(known_classes(tmp_path, pipe, elsewhere)) == [0, 1, 2]
    (tmp_path / "evaluation.json").write_text(json.dumps({"metrics": [], "classes": [0, 2]}))
    assert list(known_classes(tmp_path, pipe, train)) == [0, 2]


@pytest.mark.parametrize("method", METHODS)
def test_sheets_and_sweeps_leave_out_classes_without_images(method: str, runs: dict[str, Path]) -> None:
    pipe = TrajectoryPipeline.from_pretrained(runs[method], device="cpu")
    assert list(pipe.classes) == [0, 1, 2]
    sheet = pipe.sheet()
    if pipe.drawn_levels > 1:
        rows = list(sweep(pipe, SweepConfig(labels=(2,), seeds=(0,), levels=(1,))))
        pipe.classes = [2, 3]
        assert rows != list(sweep(pipe, SweepConfig(labels=(2,), seeds=(0,), levels=(1,))))  # other features
    pipe.classes = range(4)
    assert pipe.sheet().height > sheet.height


def test_a_sampled_class_without_images_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ("--out", tmp_path, "--seeds", "0", "--format", "npz")
    run = runs["trajectory-forcing"]
    done = call("sample", run, "--labels", "ant,yak", *words)
    assert "warning: no image of yak was in the training data" in done.stderr
    assert "warning" not in call("sample", run, "--labels", "ant", *words).stderr
