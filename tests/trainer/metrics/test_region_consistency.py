"""Parent misrouting and consistency of levels against planted cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hierarchy_builder.canvases import level_canvases
from hierarchy_builder.errors import UsageError
from trainer.metrics.region_consistency import (
    consistency,
    decoded_consistency,
    level_consistency,
    misrouting_by_pair,
    parent_misrouting,
)

SIDE = 8
PARENT = torch.arange(SIDE * SIDE).view(SIDE, SIDE) // 32
CHILD = torch.arange(SIDE * SIDE).view(SIDE, SIDE) // 16
ONE_HOT = torch.eye(2)[PARENT] + 0.1 * torch.rand(SIDE, SIDE, 2, generator=torch.Generator().manual_seed(0))


def test_nested_regions_are_not_misrouted() -> None:
    assert parent_misrouting(CHILD, PARENT, ONE_HOT) == {"spatial": 0.0, "feature": 0.0}
    assert parent_misrouting(CHILD.numpy().astype(np.uint8), PARENT.numpy())["spatial"] == 0.0


@pytest.mark.parametrize("planted", [1, 3, 7])
def test_planted_tokens_are_counted(planted: int) -> None:
    """k tokens of child 1 (parent 0) carry the parent id 1."""
    parent = PARENT.clone()
    parent.view(-1)[16 : 16 + planted] = 1
    assert parent_misrouting(CHILD, parent)["spatial"] == planted / 64
    features = torch.eye(2)[PARENT].clone()
    features.view(-1, 2)[40 : 40 + planted] = torch.tensor([1.0, 0.0])  # look like the other parent
    rates = parent_misrouting(CHILD, PARENT, features)
    assert rates == {"spatial": 0.0, "feature": planted / 64}


def test_a_tie_goes_to_the_lower_parent() -> None:
    child, parent = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[2, 2, 1, 1]])
    assert parent_misrouting(child, parent)["spatial"] == 0.5
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    # Expected is parent 1, whose centre lies with the last two.
    assert parent_misrouting(child, parent, features)["feature"] == 0.5


def test_equal_centres_do_not_count_as_misrouted() -> None:
    assert parent_misrouting(CHILD, PARENT, torch.ones(SIDE, SIDE, 3))["feature"] == 0.0


def test_images_are_averaged_and_shapes_checked() -> None:
    bad = PARENT.clone()
    bad.view(-1)[16:24] = 1
    both = parent_misrouting(CHILD.expand(2, -1, -1), torch.stack([PARENT, bad]))
    assert both["spatial"] == 8 / 64 / 2
    assert math.isnan(both["feature"])
    with pytest.raises(UsageError, match="expected"):
        parent_misrouting(CHILD, PARENT[:4])
    with pytest.raises(UsageError, match="child features"):
        parent_misrouting(CHILD, PARENT, torch.ones(4, 4, 2))


def test_relabelling_children_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    child = torch.randint(0, 9, (SIDE, SIDE), generator=generator)
    features = torch.randn(SIDE, SIDE, 5, generator=generator)
    other = torch.randperm(9, generator=generator)[child]
    assert parent_misrouting(child, PARENT, features) == parent_misrouting(other, PARENT, features)


def nested() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, SIDE, SIDE, 12, generator=generator)
    subparts = torch.arange(SIDE * SIDE).view(SIDE, SIDE) // 8
    regions = torch.stack([PARENT, CHILD, subparts])[None].to(torch.uint8)
    return level_canvases(features, regions)[0], regions[0]


def test_teachers_are_consistent() -> None:
    levels, regions = nested()
    pairs = misrouting_by_pair(levels, regions)
    assert list(pairs) == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert all(rates["spatial"] == 0 for rates in pairs.values())
    assert level_consistency(levels, regions) == pytest.approx({0: 0, 1: 0, 2: 0}, abs=1e-9)


def test_consistency_sees_a_level_that_is_not_the_mean_of_the_next() -> None:
    levels, regions = nested()
    levels[1, PARENT == 0] = -levels[1, PARENT == 0]
    found = level_consistency(levels, regions)
    # On half of the tokens, level 1 points away from both of its neighbours.
    assert found == pytest.approx({0: 0.5 * 2, 1: 0.5 * 2, 2: 0}, abs=1e-6)
    pictures = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    pictures[2:, :8] = 255
    assert decoded_consistency(pictures, regions) == pytest.approx({0: 0, 1: 0.5, 2: 0})


def test_rows_of_an_evaluation() -> None:
    levels, _ = nested()
    pictures = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    rows = dict(consistency([(levels, pictures), (levels, None)], "_real"))
    assert len(rows) == 3 * 2 + 3 + 3 + 3
    assert rows["pmr_spatial_0_1_real"] == 0.0
    assert rows["decoded_consistency_2_real"] == 0.0
    assert all(math.isfinite(value) for value in rows.values())
