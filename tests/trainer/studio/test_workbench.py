"""What a person does in the studio, without a browser: steps, their order, and what is said when one makes no sense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import GRID, tiny_pipeline

from hierarchy_builder.errors import UsageError
from trainer.studio.board import CELL_PX, GAP_PX, HEADER_PX, draw_board
from trainer.studio.folder import StudioFolder
from trainer.studio.workbench import Workbench, history_lines, markdown_report
from trainer.trajectories.pipeline import TrajectoryPipeline


@pytest.fixture(scope="module")
def pipe() -> TrajectoryPipeline:
    return tiny_pipeline()


@pytest.fixture
def bench(pipe: TrajectoryPipeline) -> Workbench:
    return Workbench().open(pipe(label="bee", seed=3))


def test_a_place_on_the_board_is_the_token_drawn_there(bench: Workbench) -> None:
    board = draw_board(bench.current())
    step = CELL_PX + GAP_PX
    assert board.picture.shape == (HEADER_PX + 3 * step - GAP_PX, 4 * step - GAP_PX, 3)
    for level, row, column, view in ((0, 0, 0, 0), (1, 5, 4, 2), (3, 2, 3, 1)):
        x = level * step + (column + 0.5) * CELL_PX / GRID[1]
        y = HEADER_PX + view * step + (row + 0.5) * CELL_PX / GRID[0]
        assert board.place(x, y) == (level, row, column)
    assert board.place(CELL_PX + 1, HEADER_PX + 5) is None
    assert board.place(5, HEADER_PX - 1) is None
    assert board.place(4 * step + 5, HEADER_PX + 5) is None


def test_a_selection_marks_its_level_alone(bench: Workbench) -> None:
    plain = draw_board(bench.current())
    marked = draw_board(bench.current(), bench.click(1, 2, 2).chosen())
    step = CELL_PX + GAP_PX
    differs = (plain.picture != marked.picture).any(axis=(0, 2)).nonzero()[0]
    assert step <= differs.min() < differs.max() < 2 * step
    assert marked.cell(0).shape == (CELL_PX, CELL_PX, 3)
    np.testing.assert_array_equal(marked.cell(0), plain.cell(0))


def test_clicks_select_and_join(bench: Workbench) -> None:
    region = bench.click(1, 2, 2)
    ids = bench.current().regions()[1]
    assert torch.equal(region.chosen().mask, ids == ids[2, 2])
    token = bench.click(3, 0, 4, pick="region")  # tokens of the last level are no regions
    assert (token.chosen().level, token.chosen().tokens) == (3, [4])
    similar = bench.click(1, 2, 2, pick="similar", cosine=-1.0)
    assert similar.chosen().count == GRID[0] * GRID[1]
    one = bench.click(1, 0, 0, pick="token")
    two = one.click(1, 0, 1, pick="token", join="add")
    assert two.chosen().tokens == [0, 1]
    assert two.click(1, 0, 1, pick="token", join="remove").chosen().tokens == [0]
    assert two.click(1, 0, 1, pick="token", join="intersect").chosen().tokens == [1]
    assert two.click(2, 0, 3, pick="token", join="add").chosen().level == 2
    with pytest.raises(UsageError, match="selections of levels 1 and 2 cannot be joined"):
        two.click(2, 0, 1, pick="token", join="remove")
    for join in ("remove", "intersect"):
        with pytest.raises(UsageError, match="nothing is selected"):
            bench.click(1, 0, 0, pick="token", join=join).chosen()


def test_a_selection_grows_shrinks_inverts_and_goes(bench: Workbench) -> None:
    one = bench.click(1, 2, 2, pick="token")
    assert one.reshape_selection("grow").chosen().count == 5
    assert one.reshape_selection("grow").reshape_selection("shrink").chosen().tokens == one.chosen().tokens
    assert one.reshape_selection("invert").chosen().count == GRID[0] * GRID[1] - 1
    assert one.reshape_selection("clear").selection is None
    with pytest.raises(UsageError, match="nothing is selected: click a token"):
        bench.reshape_selection("grow")


def test_painting_selects(bench: Workbench) -> None:
    painting = np.zeros((60, 50, 4), dtype=np.uint8)
    painting[:10, :20, 3] = 255
    assert bench.paint(painting, level=2).chosen().tokens == [0, 1]
    for empty in (None, np.zeros_like(painting)):
        with pytest.raises(UsageError, match="nothing is painted"):
            bench.paint(empty, level=2)


def test_edit_resume_undo_redo_compare(bench: Workbench, pipe: TrajectoryPipeline) -> None:
    taken = bench.open(pipe(label="emu", seed=1)).click(1, 0, 0).take()
    ready = taken.open(bench.current()).click(1, 3, 2)  # what was taken goes along
    assert "level 1 (class emu, seed 1)" in ready.taken_from
    edited = ready.apply_features(0.5)
    drawn = edited.resume()
    before, after = bench.current().levels, drawn.current().levels
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[2:], after[2:])
    mask = ready.chosen().mask
    assert torch.equal(before[1][~mask], after[1][~mask])
    assert len(history_lines(drawn.current())) == 2
    undone = drawn.undo().undo()
    assert torch.equal(undone.current().levels, before)
    redone = undone.redo().redo()
    assert torch.equal(redone.current().levels, after)
    with pytest.raises(UsageError, match="nothing to redo"):
        redone.redo()
    with pytest.raises(UsageError, match="nothing to redo"):
        undone.apply_features().redo()  # something else was done since
    picture, rows = drawn.comparison()
    assert picture.width > 400
    assert [row["equal"] for row in rows] == [True, False, False, False]
    assert rows[1]["lis"] == 0
    assert rows[1]["inside"] > 0
    assert all(row["equal"] for row in drawn.pin().comparison()[1])
    report = markdown_report(drawn)
    assert "replaced the features of" in report
    assert "drew the levels after 1 again" in report
    assert f"| {rows[3]['change']:.4g} |" in report


def test_shape_edits_follow_the_region(bench: Workbench) -> None:
    chosen = bench.click(1, 3, 2)
    grown = chosen.reshape_region("grow")
    assert grown.chosen().count > chosen.chosen().count
    assert history_lines(grown.current())[0].startswith("merged")
    assert grown.resume().current().num_levels == 4


def test_workbench_says_what_is_missing(bench: Workbench) -> None:
    with pytest.raises(UsageError, match="there is no trajectory yet: choose a class"):
        Workbench().click(0, 0, 0)
    with pytest.raises(UsageError, match="nothing is selected: click a token"):
        bench.apply_features()
    with pytest.raises(UsageError, match="no features were taken yet"):
        bench.click(1, 0, 0).apply_features()
    with pytest.raises(UsageError, match="no level was edited since"):
        bench.resume()
    with pytest.raises(UsageError, match="nothing to undo"):
        bench.undo()


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "/etc/passwd", "", None, ".hidden", "a.b", "x" * 81, "a\n"]
)
def test_file_names_cannot_leave_the_folder(tmp_path: Path, name: str | None) -> None:
    with pytest.raises(UsageError, match="the name is"):
        StudioFolder(tmp_path).path(name, ".html")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = StudioFolder(tmp_path / "studio")
    folder.root.mkdir()
    (folder.root / "away.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UsageError, match="a link that leads out of"):
        folder.trajectory("away")
    with pytest.raises(UsageError, match=r"no trajectory 'other' in .*, found away"):
        folder.trajectory("other")


def test_what_is_not_saved_is_known_and_opening_can_be_undone(
    bench: Workbench, pipe: TrajectoryPipeline
) -> None:
    assert not bench.is_unsaved
    edited = bench.click(1, 3, 2).take().apply_features(0.5)
    assert edited.is_unsaved
    assert not edited.undo().is_unsaved
    assert not edited.saved().is_unsaved
    other = edited.open(pipe(label="ant", seed=0))
    assert other.undo().current() is edited.current()
    assert other.undo().is_unsaved
