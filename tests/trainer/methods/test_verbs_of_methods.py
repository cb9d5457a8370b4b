"""What `evaluate`, `sample` and `report` say of runs of each method, and what they refuse before any work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from command_line import trainer
from tiny_runs import FLOW, LATENT, NORMALIZING

from trainer.methods import registry
from trainer.trajectories.pipeline import TrajectoryPipeline

METHODS = {"trajectory-forcing": FLOW, "latent-forcing": LATENT, "normalizing-trajectory": NORMALIZING}


@pytest.fixture(scope="module")
def runs(picture_shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in METHODS.items():
        config = dataclasses.replace(config, total_images=16, log_images=8, sample_images=None)
        registry.train(config, picture_shards, str(folder / name), quiet=True)  # type: ignore[arg-type]
    return {name: folder / name for name in METHODS}


@pytest.mark.parametrize("method", ["latent-forcing", "normalizing-trajectory"])
def test_alignment_is_refused_before_samples_are_drawn(
    method: str, runs: dict[str, Path], picture_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrajectoryPipeline, "stream", lambda *_: pytest.fail("samples were drawn"))
    said = trainer("evaluate", runs[method], "--shards", picture_shards, "--alignment", code=2).err
    assert "--alignment needs a model of Trajectory Forcing" in said
    assert not (runs[method] / "evaluation.json").exists()


@pytest.mark.parametrize("method", ["latent-forcing", "normalizing-trajectory"])
def test_edits_are_refused_of_samples_with_one_level(
    method: str, runs: dict[str, Path], picture_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrajectoryPipeline, "stream", lambda *_: pytest.fail("samples were drawn"))
    said = trainer("evaluate", runs[method], "--shards", picture_shards, "--edits", code=2).err
    assert "samples of this run have one level: leave out --edits" in said


def test_a_space_needs_pictures_before_samples_are_drawn(
    runs: dict[str, Path], shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrajectoryPipeline, "stream", lambda *_: pytest.fail("samples were drawn"))
    space = ("--space", "dct")
    refused = trainer("evaluate", runs["trajectory-forcing"], "--shards", shards, *space, code=1)
    assert "holds no picture" in refused.err


def test_a_reference_needs_the_space_it_is_of(
    runs: dict[str, Path], picture_shards: str, tmp_path: Path
) -> None:
    (tmp_path / "real.npz").write_bytes(b"")
    words = ("--shards", picture_shards, "--reference", tmp_path / "real.npz")
    assert "add --inception FILE" in trainer("evaluate", runs["trajectory-forcing"], *words, code=2).err


@pytest.mark.parametrize(
    "words",
    [
        ("--edits",),
        ("--alignment",),
        ("--inception", "hub"),
        ("--space", "hierarchy_builder.encoders:load_encoder:dct"),
        ("--guidance", "2", "--samples-per-class", "3"),
        ("--ending", "inverse"),
    ],
)
def test_likelihood_refuses_options_of_samples(
    words: tuple[str, ...], runs: dict[str, Path], picture_shards: str
) -> None:
    run = runs["normalizing-trajectory"]
    said = trainer("evaluate", run, "--shards", picture_shards, "--likelihood", *words, code=2).err
    flags = ", ".join(reversed([word for word in words if word.startswith("--")]))
    assert f"--likelihood does not go with {flags}" in said
    assert not (run / "likelihood.json").exists()


@pytest.mark.parametrize(
    ("method", "taken"), [("trajectory-forcing", 1), ("latent-forcing", 25), ("normalizing-trajectory", 4)]
)
def test_pages_say_how_many_steps_were_taken(
    method: str, taken: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    trainer("sample", runs[method], "--labels", "bee", "--seeds", "0", "--format", "html", "--out", tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r"<dt>steps[^<]*</dt>\s*<dd>(\d+)</dd>", page) == [str(taken)]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("trajectory-forcing", "losses of u and v"),
        ("latent-forcing", "loss_latents"),
        ("normalizing-trajectory", "bits"),
    ],
)
def test_curves_are_explained_by_method(
    method: str, said: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    trainer("report", runs[method], "--out", tmp_path / "report.html")
    section = re.search(r"From metrics.jsonl\.[^<]*", (tmp_path / "report.html").read_text())
    assert section is not None
    assert said in section[0]
    assert ("stay near 1" in section[0]) == (method == "trajectory-forcing")
