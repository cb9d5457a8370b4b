"""Samples against real images while they are drawn, and the studies kept in a run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from documented import undocumented
from tiny_pipeline import tiny_pipeline

from hierarchy_builder.errors import UsageError
from trainer.evaluation.distribution import (
    TOKENS_PER_IMAGE,
    Crowd,
    Pictures,
    distances,
    picture_distances,
    seen_by,
)
from trainer.evaluation.studies import alignment_study, edit_study
from trainer.metrics.frechet import Gaussian


def crowd(images: int, shift: float = 0.0, seed: int = 0) -> Crowd:
    """Tokens N(shift, 1), in parts of uneven size."""
    canvases = torch.randn(images, 2, 8, 8, 3, generator=torch.Generator().manual_seed(seed)) + shift
    found = Crowd(2, 3, classes=(0,))
    for part in canvases.split([1, images - 1]):
        found.add(part, [0] * len(part))
    return found


def test_distances_of_shifted_gaussians() -> None:
    real, halves = crowd(200), (crowd(100, seed=1), crowd(100, seed=2))
    found = dict(distances(crowd(200, shift=2.0, seed=3), real, halves))
    # Equal covariances: the squared shift alone, 2² in each of three channels.
    for name in ("frechet_pooled", "frechet_tokens_0", "frechet_tokens_1"):
        assert found[name] == pytest.approx(12, rel=0.05)
        assert found[f"{name}_real"] < 0.05
    assert (found["precision"], found["recall"], found["coverage"]) == (0.0, 0.0, 0.0)
    assert found["precision_real"] > 0.8
    assert found["coverage_real"] > 0.9
    for name in ("variety_0", "variety_1", "variety_0_real", "variety_1_real"):
        assert found[name] == pytest.approx(1, rel=0.05)
    assert (found["num_samples"], found["num_real"]) == (200.0, 200.0)
    assert real.tokens[0].count == 200 * TOKENS_PER_IMAGE


def test_manifolds_are_of_equally_many_images_so_that_their_references_compare() -> None:
    """Of one distribution, few samples reach fewer of many real images than half of those reach of the other half."""
    real, halves = crowd(2000), (crowd(1000, seed=1), crowd(1000, seed=2))
    found = dict(distances(crowd(40, seed=3), real, halves))
    for name in ("precision", "recall", "coverage"):
        assert found[name] == pytest.approx(found[f"{name}_real"], abs=0.2)
    assert found["variety_1"] == pytest.approx(1, rel=0.1)


def test_few_images_have_no_precision() -> None:
    found = dict(distances(crowd(3), crowd(3, seed=1), (crowd(2), crowd(2, seed=1))))
    assert "precision" not in found
    assert math.isfinite(found["frechet_pooled"])


def test_pictures_give_fid_and_inception_score() -> None:
    def inception(pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        means = torch.from_numpy(pictures.astype(np.float32)).mean(dim=(1, 2))
        return means, 100 * torch.eye(4)[torch.arange(len(pictures)) % 4]

    pictures = Pictures(inception)
    assert list(pictures.metrics(None)) == []
    random = np.random.default_rng(0)
    for _ in range(10):
        pictures.add(random.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8))
    found = dict(pictures.metrics(Gaussian(np.full(3, 127.0), np.eye(3) * 80)))
    assert found["inception_score"] == pytest.approx(4.0)
    assert found["fid"] < 50
    assert undocumented(found) == []
    assert "fid" not in dict(pictures.metrics(None))


def test_studies_write_files_and_yield_their_main_numbers(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    edits = dict(edit_study(pipe, tmp_path, [0], [0, 1]))
    written = json.loads((tmp_path / "edits.json").read_text())
    line = next(
        line
        for line in written["summary"]
        if (line["level"], line["measured"], line["arm"]) == (1, 3, "edit")
    )
    assert edits["lis_1_3"] == line["lis_mean"]
    assert edits["lis_1_3_low"] < edits["lis_1_3"] < edits["lis_1_3_high"]
    assert {"gain_0_1", "lis_0_1_other_noise"} <= set(edits)
    assert "lis_1_1" not in edits
    shares = dict(alignment_study(pipe, tmp_path, [0], [0, 1], num_steps=3))
    summary = json.loads((tmp_path / "alignment.json").read_text())["summary"]
    early = [
        line["f_mean"]
        for line in summary
        if (line["level"], line["partition"]) == (2, "flat")
        and line["t"] > sorted({line["t"] for line in summary})[1]
    ]
    assert len(early) == 2
    assert shares["alignment_2_flat"] == pytest.approx(np.mean(early))
    assert undocumented([*edits, *shares]) == []


def test_alignment_asks_for_the_method_it_is_about(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    pipe.model.config = tiny_pipeline().model.config  # type: ignore[assignment]
    with pytest.raises(UsageError, match="--alignment needs a model of Trajectory Forcing, found Linear"):
        dict(alignment_study(pipe, tmp_path, [0], [0]))


class _MeanColour:
    """An encoder of one token, the mean colour."""

    name = "mean colour"
    image_size_px = 16

    def encode(self, images: np.ndarray) -> np.ndarray:
        assert images.shape[1:] == (16, 16, 3)
        return images.astype(np.float32).mean(axis=(1, 2), keepdims=True)


def test_pictures_in_the_space_of_an_encoder() -> None:
    def seen(mean: int, count: int, seed: int) -> Crowd:
        found, random = Crowd(2, 3), np.random.default_rng(seed)
        colours = random.normal(mean, 5, (count, 1, 1, 3)).round().clip(0, 255)
        found.add_pictures(seen_by(_MeanColour(), colours.repeat(8, 1).repeat(4, 2).astype(np.uint8)))
        return found

    real, halves = seen(100, 400, 0), (seen(100, 200, 1), seen(100, 200, 2))
    found = dict(picture_distances(seen(130, 400, 3), real, halves))
    # Equal covariances: the squared shift of 30 in each of three channels.
    assert found["frechet_pictures"] == pytest.approx(2700, rel=0.05)
    assert undocumented(found) == []
    assert found["frechet_pictures_real"] < 10
    assert found["precision_pictures"] == 0.0
    assert found["recall_pictures_real"] > 0.8
