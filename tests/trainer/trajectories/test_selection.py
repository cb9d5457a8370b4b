"""Selections of tokens: where they come from, how they join, and that they stay on their level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hierarchy_builder.errors import UsageError
from trainer.metrics.regions import extract_regions, max_regions
from trainer.trajectories.selection import Selection

GRID = (3, 4)
masks = st.lists(st.booleans(), min_size=12, max_size=12).map(
    lambda bits: Selection(mask=torch.tensor(bits).view(GRID), level=1)
)


def test_coordinates_are_rows_and_columns() -> None:
    selection = Selection.from_coordinates([(0, 1), (2, 3)], grid=GRID, level=1)
    assert selection.tokens == [1, 11]
    assert (selection.count, selection.grid, selection.level) == (2, GRID, 1)
    for outside in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(UsageError, match="outside the grid of 3 rows and 4 columns"):
            Selection.from_coordinates([outside], grid=GRID, level=1)


def test_painting_selects_tokens_at_least_half_covered() -> None:
    painting = np.zeros((30, 40), dtype=np.uint8)
    painting[:10, :15] = 255  # all of token 0, half of token 1
    painting[10:20, 26:30] = 1  # 4 tenths of token 6
    assert Selection.from_painting(painting, grid=GRID, level=0).tokens == [0, 1]
    assert Selection.from_painting(painting, grid=GRID, level=0, share=0.4).tokens == [0, 1, 6]
    assert Selection.from_painting(painting, grid=GRID, level=0, share=0).tokens == [0, 1, 6]
    rgba = np.zeros((30, 40, 4), dtype=np.uint8)
    rgba[..., :3] = 255
    rgba[20:, 30:, 3] = 9
    assert Selection.from_painting(rgba, grid=GRID, level=0).tokens == [11]
    with pytest.raises(UsageError, match="painting has shape"):
        Selection.from_painting(np.zeros((3, 4, 3)), grid=GRID, level=0)


def test_regions_are_taken_by_id() -> None:
    regions = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [0, 2, 2, 4]])
    assert Selection.from_region(regions, 2, level=1).tokens == [5, 6, 9, 10]
    assert Selection.from_region(regions, [1, 4], level=1).tokens == [2, 3, 7, 11]
    with pytest.raises(UsageError, match="level 1 has no region 3, only 0, 1, 2, 4"):
        Selection.from_region(regions, 3, level=1)


def test_neighbours_by_cosine() -> None:
    canvas = torch.zeros(3, 4, 2)
    canvas[..., 0] = 1.0
    canvas[0, 0] = canvas[2, 3] = torch.tensor([3.0, 3.0])  # cosine 0.7071 with the others
    alike = Selection.from_neighbours(canvas, (0, 0), level=2)
    assert (alike.tokens, alike.level) == ([0, 11], 2)
    assert Selection.from_neighbours(canvas, (0, 0), level=2, connected=True).tokens == [0]
    assert Selection.from_neighbours(canvas, (0, 0), level=2, cosine=0.7).count == 12
    assert Selection.from_neighbours(torch.zeros(3, 4, 2), (1, 1), level=2).tokens == [5]


@given(masks, masks)
def test_joining_is_that_of_sets(a: Selection, b: Selection) -> None:
    one, other, everything = set(a.tokens), set(b.tokens), set(range(12))
    assert set((a | b).tokens) == one | other
    assert set((a & b).tokens) == one & other
    assert set((a - b).tokens) == one - other
    assert set((~a).tokens) == everything - one


@given(masks)
def test_growing_and_shrinking_follow_sides(a: Selection) -> None:
    grown = {
        (y + dy) * 4 + x + dx
        for token in a.tokens
        for y, x in [divmod(token, 4)]
        for dy, dx in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
        if 0 <= y + dy < 3 and 0 <= x + dx < 4
    }
    assert set(a.grow().tokens) == grown
    assert a.grow(2).tokens == a.grow().grow().tokens
    assert (~a).grow().tokens == (~a.shrink()).tokens


def test_levels_do_not_mix() -> None:
    one = Selection.from_coordinates([(0, 0)], grid=GRID, level=1)
    other = Selection.from_coordinates([(0, 1)], grid=GRID, level=2)
    for join in (one.__or__, one.__and__, one.__sub__):
        with pytest.raises(UsageError, match="levels 1 and 2 cannot be joined"):
            join(other)
    assert (one | other.at(1)).tokens == [0, 1]
    with pytest.raises(UsageError, match="grids"):
        one | Selection.from_coordinates([(0, 0)], grid=(4, 3), level=1)


def test_what_an_edit_requires() -> None:
    selection = Selection.from_coordinates([(0, 0)], grid=GRID, level=1)
    selection.require(GRID, 1)
    with pytest.raises(UsageError, match="of level 1, the edit of level 2"):
        selection.require(GRID, 2)
    with pytest.raises(UsageError, match="grid"):
        selection.require((4, 4), 1)
    with pytest.raises(UsageError, match="nothing is selected on level 1: click a token"):
        (selection - selection).require(GRID, 1)
    with pytest.raises(UsageError, match="expected bool"):
        Selection(mask=torch.zeros(GRID), level=1)


def test_regions_of_piecewise_constant_canvases_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    objects = torch.zeros(8, 8, dtype=torch.long)
    objects[2:6, 2:6] = 1
    parts = objects.clone()
    parts[4:6, 2:6] = 2
    subparts = parts.clone()
    subparts[4:6, 4:6] = 3
    tokens = torch.randn(4, 12, generator=generator)
    levels = torch.stack([tokens[ids] for ids in (objects, parts, subparts)])
    levels = torch.cat([levels, torch.randn(1, 8, 8, 12, generator=generator)])
    assert torch.equal(extract_regions(levels), torch.stack([objects, parts, subparts]).to(torch.uint8))


def test_regions_of_canvases_of_one_value_or_none() -> None:
    levels = torch.ones(4, 8, 8, 3)
    assert torch.equal(extract_regions(levels), torch.ones(3, 8, 8, dtype=torch.uint8))
    noise = torch.randn(4, 16, 16, 8, generator=torch.Generator().manual_seed(0))
    found = extract_regions(noise)
    assert [int(ids.max()) + 1 for ids in found] == [max_regions(level) for level in range(3)] == [2, 8, 32]
    assert [len(ids.unique()) for ids in found] == [2, 8, 32]
    noise[0, 0, 0, 0] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        extract_regions(noise)
