"""Edits of trajectories: what changes, what keeps its bits, and the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import GRID, tiny_pipeline

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.hierarchy.recipe import build_hierarchy
from trainer.data.normalisation import Normaliser
from trainer.trajectories.edit import (
    Source,
    as_source,
    move_tokens,
    prototype,
    replace_features,
    tokens_of,
)
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory


@pytest.fixture(scope="module")
def pipe() -> TrajectoryPipeline:
    return tiny_pipeline()


def select(*coordinates: tuple[int, int], level: int = 1) -> Selection:
    return Selection.from_coordinates(coordinates, grid=GRID, level=level)


def test_feature_edit_touches_selected_tokens_only(pipe: TrajectoryPipeline) -> None:
    before, other = pipe("ant", 1), pipe("bee", 2)
    selection = select((1, 1), (1, 2), (2, 1))
    after = before.edit_features(selection, other.mean_of(select((0, 0), (0, 1))))
    expected = before.levels.clone()
    expected[1, selection.mask] = other.levels[1, 0, :2].mean(dim=0)
    assert torch.equal(after.levels, expected)
    assert len(before.history) == 0
    assert after.history[0]["edit"] == "features"
    assert after.history[0]["from"]["tokens"] == [0, 1]


@pytest.mark.parametrize("level", range(4))
def test_levels_before_an_edit_keep_their_bits(level: int) -> None:
    normaliser = Normaliser(mean=torch.randn(48), std=torch.rand(48) + 0.3)
    before = tiny_pipeline(normaliser=normaliser)("emu", 5)
    after = before.edit_features(select((3, 2), level=level), 3 * torch.ones(48)).resume(level)
    assert torch.equal(after.levels[:level], before.levels[:level])
    assert torch.equal(after.levels[level, 3, 2], 3 * torch.ones(48))
    kept = ~select((3, 2), level=level).mask
    assert torch.equal(after.levels[level, kept], before.levels[level, kept])
    for finer in range(level + 1, 4):
        assert not torch.equal(after.levels[finer], before.levels[finer])


@pytest.mark.parametrize("kept", range(4))
def test_resuming_without_an_edit_draws_the_same(pipe: TrajectoryPipeline, kept: int) -> None:
    before = pipe("ant", 3, num_steps=2)
    again = before.resume(kept)
    torch.testing.assert_close(again.levels, before.levels, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.levels[: kept + 1], before.levels[: kept + 1])


def test_new_seeds_by_level(pipe: TrajectoryPipeline) -> None:
    before = pipe("ant", 3)
    whole = before.resume(1, 9)
    assert whole.seeds == (3, 3, 9, 9)
    assert not torch.allclose(whole.levels[2], before.levels[2], atol=1e-3)
    last = before.resume(1, {3: 9})
    assert last.seeds == (3, 3, 3, 9)
    torch.testing.assert_close(last.levels[2], before.levels[2], atol=1e-5, rtol=1e-5)
    assert before.resume(1, [9, 4]).seeds == (3, 3, 9, 4)
    # A trajectory drawn with seed 9 whose first levels are those of seed 3 is the same chain.
    mixed = pipe("ant", 9)
    mixed.levels[:2] = before.levels[:2]
    torch.testing.assert_close(mixed.resume(1).levels, whole.levels, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="1 seeds for 2 levels after level 1"):
        before.resume(1, [9])
    with pytest.raises(UsageError, match="a seed for level 1, which is kept"):
        before.resume(1, {1: 9})
    with pytest.raises(UsageError, match="level 4, expected 0 to 3"):
        before.resume(4)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 1.5])
def test_strength_is_linear(pipe: TrajectoryPipeline, strength: float) -> None:
    before, selection = pipe("ant", 1), select((2, 2))
    target = torch.arange(48.0)
    after = before.edit_features(selection, target, strength)
    token = before.levels[1, 2, 2]
    torch.testing.assert_close(after.levels[1, 2, 2], (1 - strength) * token + strength * target)
    if strength == 0:
        assert torch.equal(after.levels, before.levels)


def test_identity_edit_changes_no_bit(pipe: TrajectoryPipeline) -> None:
    before, selection = pipe("ant", 1), select((2, 2), (0, 4), level=2)
    for strength in (0.3, 1.0):
        after = before.edit_features(selection, before.tokens_of(selection), strength).resume(2)
        assert torch.equal(after.levels, before.resume(2).levels)


def test_token_by_token_follows_the_shape(pipe: TrajectoryPipeline) -> None:
    other = pipe("bee", 2)
    shape, moved = select((0, 0), (0, 1), (1, 1)), select((3, 2), (3, 3), (4, 3))
    after = pipe("ant", 1).edit_features(moved, other.tokens_of(shape))
    assert torch.equal(after.levels[1, moved.mask], other.levels[1, shape.mask])
    # A line of four over a line of two: each end takes the nearer end.
    line, pair = select(*((0, x) for x in range(4))), select((5, 0), (5, 4))
    after = pipe("ant", 1).edit_features(line, other.tokens_of(pair))
    assert torch.equal(after.levels[1, 0, :4], other.levels[1, 5, [0, 0, 4, 4]])


def test_sources_are_checked(pipe: TrajectoryPipeline, tmp_path: Path) -> None:
    before, selection = pipe("ant", 1), select((2, 2))
    with pytest.raises(UsageError, match="expected \\[C\\], one feature for each of the 1 selected"):
        before.edit_features(selection, torch.zeros(2, 48))
    with pytest.raises(UsageError, match="source has 3 channels, the canvas 48"):
        before.edit_features(selection, torch.zeros(3))
    with pytest.raises(UsageError, match="strength is nan"):
        before.edit_features(selection, torch.zeros(48), float("nan"))
    canvas = torch.randn(*GRID, 48)
    assert torch.equal(as_source(canvas, selection).over(selection), canvas[2, 2][None])
    centroids = np.arange(96, dtype=np.float32).reshape(2, 48)
    np.savez(tmp_path / "vocabulary.npz", centroids_0=centroids[:1], centroids_1=centroids)
    after = before.edit_features(selection, prototype(tmp_path / "vocabulary.npz", 1))
    assert torch.equal(after.levels[1, 2, 2], torch.arange(48.0, 96.0))
    with pytest.raises(UsageError, match="prototypes 0 to 0 on that level, not 1"):
        prototype(tmp_path / "vocabulary.npz", 1, level=0)
    (tmp_path / "vocabulary.npz").write_bytes(b"text")
    with pytest.raises(TrainerError, match="cannot be read"):
        prototype(tmp_path / "vocabulary.npz", 0)


def test_a_region_that_is_a_whole_level_has_no_border(pipe: TrajectoryPipeline) -> None:
    grid = pipe.model.config.grid
    flat = pipe.from_features(torch.ones(*grid, 48), torch.zeros(3, *grid, dtype=torch.int64), label="ant")
    for move in (flat.grow_region, flat.shrink_region):
        with pytest.raises(UsageError, match="region 1 is the whole of level 0"):
            move(1, level=0)


def test_wrong_level_and_empty_selections_are_refused(pipe: TrajectoryPipeline) -> None:
    before = pipe("ant", 1)
    with pytest.raises(UsageError, match="of level 1, the edit of level 2"):
        before.edit_features(select((0, 0)), torch.zeros(48), level=2)
    with pytest.raises(UsageError, match="of level 1, the edit of level 0"):
        before.edit_shape(select((0, 0)), level=0)
    with pytest.raises(UsageError, match="nothing is selected"):
        before.edit_shape(select())
    with pytest.raises(UsageError, match="nothing is selected"):
        before.mean_of(select())
    with pytest.raises(UsageError, match="level 7, expected 0 to 3"):
        before.edit_features(select((0, 0), level=7), torch.zeros(48))


REGIONS = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 2], [0, 1, 1, 2]])


def test_moved_tokens_take_the_mean_of_their_new_region() -> None:
    canvas = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    selection = Selection.from_coordinates([(0, 1), (1, 3)], grid=(3, 4), level=1)
    edited, regions = move_tokens(canvas, REGIONS, selection, 1)
    expected = canvas.clone()
    expected[0, 1] = expected[1, 3] = canvas[REGIONS == 1].mean(dim=0)
    assert torch.equal(edited, expected)
    assert regions.tolist() == [[0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 2]]
    inside = Selection.from_region(REGIONS, 1, level=1)
    assert torch.equal(move_tokens(canvas, REGIONS, inside, 1)[0], canvas)
    with pytest.raises(UsageError, match="level 1 has no region 3, only 0 to 2"):
        move_tokens(canvas, REGIONS, selection, 3)


def test_tokens_move_to_the_region_most_neighbours_are_of() -> None:
    canvas = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    region = Selection.from_region(REGIONS, 1, level=1)
    _, regions = move_tokens(canvas, REGIONS, region)
    # The upper pair meets 0 above; the lower right token 2 at its side; ties go to the lower id.
    assert regions.tolist() == [[0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 2]]
    corner = Selection.from_coordinates([(0, 0)], grid=(3, 4), level=1)
    with pytest.raises(UsageError, match="1 of the selected tokens touch no other region"):
        move_tokens(canvas, REGIONS, corner)


def test_regions_grow_and_shrink(pipe: TrajectoryPipeline) -> None:
    features = np.zeros((*GRID, 48), dtype=np.float32)
    features[..., 0], features[..., 1] = 1.0, 0.1
    features[2:4, 1:4, 2] = 3.0
    start = pipe.from_features(features, label="ant")
    inside = start.region(1, level=1)
    assert inside.count == 6
    grown = start.grow_region(1, level=1)
    assert grown.region(1, level=1).tokens == inside.grow().tokens
    assert torch.equal(grown.levels[2:], start.levels[2:])
    back = grown.shrink_region(1, level=1)
    assert back.region(1, level=1).tokens == inside.tokens
    torch.testing.assert_close(back.levels, start.levels)


def test_undo_is_exact_and_survives_the_disk(pipe: TrajectoryPipeline, tmp_path: Path) -> None:
    first = pipe("ant", 1)
    second = first.edit_features(select((2, 2)), torch.ones(48))
    third = second.resume(1, 8)
    fourth = third.edit_shape(select((0, 0), level=3), 0)
    fourth.save(tmp_path / "a.safetensors")
    steps = Trajectory.load(tmp_path / "a.safetensors")
    for earlier in (fourth, third, second, first):
        assert torch.equal(steps.levels, earlier.levels)
        assert (steps.seeds, steps.history) == (earlier.seeds, earlier.history)
        if earlier is not first:
            steps = steps.undo()
    with pytest.raises(UsageError, match="nothing to undo"):
        steps.undo()


def test_files_need_a_model_to_resume(pipe: TrajectoryPipeline, tmp_path: Path) -> None:
    pipe("ant", 1).save(tmp_path / "a.safetensors")
    back = Trajectory.load(tmp_path / "a.safetensors")
    with pytest.raises(TrainerError, match="no model to resume with"):
        back.resume(1)
    torch.testing.assert_close(pipe.adopt(back).resume(1).levels, back.levels, atol=1e-5, rtol=1e-5)
    back.levels = back.levels[:, :4]
    with pytest.raises(MismatchError, match="levels have shape"):
        pipe.adopt(back)


def test_file_names_its_model_relative_to_itself(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.weights = {"folder": str(tmp_path / "run" / "checkpoints" / "step-00000001"), "ema": "500"}
    (tmp_path / "out").mkdir()
    pipe("ant", 1).save(tmp_path / "out" / "a.safetensors")
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "out").rename(tmp_path / "moved" / "out")
    back = Trajectory.load(moved / "a.safetensors")
    assert back.model["folder"] == str(tmp_path / "moved" / "run" / "checkpoints" / "step-00000001")
    assert str(tmp_path).encode() not in (moved / "a.safetensors").read_bytes()
    pipe.adopt(back)
    pipe.weights = {**pipe.weights, "ema": "raw"}
    with pytest.raises(
        MismatchError, match=r"drawn by step-00000001 \(ema 500\), this is step-00000001 \(ema raw"
    ):
        pipe.adopt(back)


def test_photograph_is_a_start(pipe: TrajectoryPipeline) -> None:
    features = np.random.default_rng(0).normal(size=(*GRID, 48)).astype(np.float32)
    start = pipe.from_features(features, label="bee", seed=4, origin={"key": "bee/1"})
    regions = build_hierarchy(features[None]).regions
    expected = level_canvases(torch.from_numpy(features[None]), regions)[0]
    torch.testing.assert_close(start.levels, expected)
    assert (start.label, start.seeds, start.origin) == (1, (4,) * 4, {"key": "bee/1"})
    after = start.edit_features(select((2, 2)), torch.ones(48)).resume(1)
    assert torch.equal(after.levels[0], start.levels[0])
    drawn = pipe("bee", 4)
    assert not torch.allclose(after.levels[2], drawn.levels[2], atol=1e-3)
    with pytest.raises(MismatchError, match="encode the photograph with 'dct'"):
        pipe.from_features(features[:, :4], label="bee")
    with pytest.raises(MismatchError, match="regions have shape"):
        pipe.from_features(features, regions[0, :2], label="bee")


def test_sources_keep_their_places() -> None:
    canvas = torch.randn(3, 4, 5)
    selection = Selection.from_coordinates([(0, 1), (2, 2)], grid=(3, 4), level=0)
    source = tokens_of(canvas, selection)
    assert torch.equal(
        replace_features(torch.zeros(3, 4, 5), selection, source)[selection.mask], source.features
    )
    everywhere = Source(features=canvas[0, :1])
    assert torch.equal(everywhere.over(selection), canvas[0, :1].expand(2, -1))
