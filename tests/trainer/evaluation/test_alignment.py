"""Outlines along the generative path: the scores, the partitions held against, and the study."""

from __future__ import annotations

import pytest
import torch
from tiny_pipeline import GRID, tiny_pipeline

from trainer.data.normalisation import Normaliser
from trainer.evaluation.studies import (
    alignment,
    alignment_of_photos,
    denoising_path,
    partitions,
    summarise_alignment,
)
from trainer.metrics.alignment import boundary_f, shifted, shuffled, tiles
from trainer.metrics.regions import divide
from trainer.seeds import level_noise

HALVES = torch.arange(64).view(8, 8) // 32


def test_boundary_f_counts_shared_borders() -> None:
    assert boundary_f(HALVES, 1 - HALVES) == 1.0
    assert boundary_f(HALVES, HALVES.T.contiguous()) == 0.0
    quarters = 2 * HALVES + HALVES.T
    assert boundary_f(HALVES, quarters) == pytest.approx(2 * 8 / (8 + 16))
    nothing = torch.zeros(8, 8, dtype=torch.long)
    assert boundary_f(nothing, nothing) == 1.0
    assert boundary_f(nothing, HALVES) == 0.0


@pytest.mark.parametrize("count", [1, 2, 5, 8, 31])
def test_tiles_are_as_many_and_about_equal(count: int) -> None:
    ids = tiles(count, (16, 12))
    sizes = torch.bincount(ids.flatten(), minlength=count)
    assert len(sizes) == count
    assert sizes.min() >= 192 / count / 2.6
    for region in range(count):  # each is a rectangle
        places = (ids == region).nonzero()
        height, width = (places.amax(dim=0) - places.amin(dim=0) + 1).tolist()
        assert height * width == len(places)


def test_shifted_and_shuffled_keep_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (8, 8), generator=generator)
    for change in (shifted, shuffled):
        for _ in range(5):
            other = change(ids, generator)
            assert torch.equal(torch.bincount(other.flatten()), torch.bincount(ids.flatten()))
            assert not torch.equal(other, ids)
    blob = torch.zeros(8, 8, dtype=torch.long)
    blob[2:4, 2:4] = 1
    places = (shifted(blob, generator) == 1).nonzero()
    assert len(places) == 4


@pytest.mark.parametrize("level", [0, 2])
def test_path_ends_where_sampling_does(level: int) -> None:
    pipe = tiny_pipeline(normaliser=Normaliser(mean=torch.randn(48), std=torch.rand(48) + 0.5))
    trajectory = pipe("bee", 4, num_steps=3)
    noise = level_noise([4], 4, GRID, 48)[level, 0]
    previous = trajectory.levels[level - 1] if level else None
    times, expected = denoising_path(pipe, 1, noise, previous, level, 3)
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert times == sorted(times, reverse=True)
    torch.testing.assert_close(expected[-1], trajectory.levels[level], atol=1e-4, rtol=1e-4)
    # At t = 1 the expected canvas is the sample of one step.
    if not level:
        torch.testing.assert_close(expected[0], pipe("bee", 4).levels[0], atol=1e-4, rtol=1e-4)


def test_partitions_have_as_many_regions() -> None:
    levels = torch.randn(4, 8, 8, 6, generator=torch.Generator().manual_seed(0))
    for target in partitions(levels, torch.Generator().manual_seed(0)):
        counts = {int(ids.max()) + 1 for ids in target.values()}
        assert len(counts) == 1
        assert all(len(ids.unique()) == int(ids.max()) + 1 for ids in target.values())


def test_photographs_are_held_against_their_teacher() -> None:
    pipe = tiny_pipeline()
    features = torch.randn(*GRID, 48, generator=torch.Generator().manual_seed(0))
    photo = pipe.from_features(features, label="bee", seed=3)
    rows = list(alignment_of_photos(pipe, [photo], num_steps=2))
    assert len(rows) == 3 * 5 * 3
    assert {row["level"] for row in rows} == {1, 2, 3}
    target = partitions(photo.levels, torch.Generator().manual_seed(3))[1]["semantic"]
    noise = level_noise([3], 4, GRID, 48)[1, 0]
    _, expected = denoising_path(pipe, 1, noise, photo.levels[0], 1, 2)
    found = [row["f"] for row in rows if (row["level"], row["partition"]) == (1, "semantic")]
    assert found == [boundary_f(divide(canvas, int(target.max()) + 1), target) for canvas in expected]


def test_study_reaches_its_own_regions() -> None:
    pipe = tiny_pipeline()
    rows = list(alignment(pipe, [0, 1], [0, 1], num_steps=3))
    assert len(rows) == 2 * 2 * 4 * 5 * 4
    summary = summarise_alignment(rows)
    assert all(line["f_n"] == 4 for line in summary)
    for line in summary:
        assert 0 <= line["f_mean"] <= 1
        if line["t"] == 0 and (line["partition"], line["level"]) in (("semantic", 0), ("flat", 3)):
            assert line["f_mean"] == 1.0
