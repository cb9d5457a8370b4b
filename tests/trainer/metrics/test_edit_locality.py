"""Locality of edits against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hierarchy_builder.errors import UsageError
from trainer.metrics.edit_locality import (
    decoded_locality,
    effectiveness,
    latent_invariance,
    token_change,
)
from trainer.metrics.spread import spread


def random_levels(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 6, 6, 16, generator=torch.Generator().manual_seed(seed))


def corner() -> torch.Tensor:
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:2, :3] = True
    return mask


def test_identity_gives_zero_exactly() -> None:
    levels = random_levels() * 1e-3
    assert latent_invariance(levels, levels.clone(), corner(), 1) == {1: 0.0, 2: 0.0, 3: 0.0}
    assert token_change(levels, levels).count_nonzero() == 0


def test_orthogonal_tokens_outside_give_their_share() -> None:
    before = torch.zeros(4, 6, 6, 8)
    before[..., 0] = 2.0
    after = before.clone()
    after[2, 3, :, 0], after[2, 3, :, 1] = 0.0, 5.0  # one row of 6 of the 30 unedited tokens turns by 90°
    after[3, 5, 5] = -after[3, 5, 5]  # and one token by 180°
    after[:, 0, 0, 3] = 9.0  # inside the edit: not counted
    found = latent_invariance(before, after, corner(), 2)
    assert found == {2: pytest.approx(6 / 30), 3: pytest.approx(2 / 30)}
    assert list(latent_invariance(before, after, corner().numpy(), 0)) == [0, 1, 2, 3]


def test_disjoint_permutation_of_one_hot_tokens() -> None:
    """Unedited tokens are moved to another's place, none to its own: each 1 − cos is 1."""
    before = torch.eye(36).view(1, 6, 6, 36)
    outside = (~corner()).flatten().nonzero()[:, 0]
    order = torch.arange(36)
    order[outside] = outside.roll(1)
    after = before.view(36, 36)[order].view(1, 6, 6, 36)
    assert latent_invariance(before, after, corner(), 0)[0] == pytest.approx(1.0)


def test_values_match_the_cosine() -> None:
    before, after = random_levels(), random_levels(1)
    expected = 1 - torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    torch.testing.assert_close(token_change(before, after), expected)
    found = latent_invariance(before.numpy(), after.numpy(), corner(), 3)
    assert found == {3: pytest.approx(float(expected[3][~corner()].mean()))}


def test_zero_tokens_have_no_direction() -> None:
    before, after = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    after[0, 0, 1, 0] = 1e-30
    assert token_change(before, after).tolist() == [[[0.0, 1.0]]]


def test_what_cannot_be_measured() -> None:
    levels = random_levels()
    assert math.isnan(latent_invariance(levels, levels, torch.ones(6, 6, dtype=torch.bool), 3)[3])
    with pytest.raises(UsageError, match="edited_mask has shape"):
        latent_invariance(levels, levels, torch.zeros(5, 5), 0)
    with pytest.raises(UsageError, match="edit_level 4, expected 0 to 3"):
        latent_invariance(levels, levels, corner(), 4)
    with pytest.raises(UsageError, match="expected equal ones"):
        latent_invariance(levels, levels[:3], corner(), 0)


def test_effect_of_reaching_the_source() -> None:
    before, mask = torch.zeros(3, 6, 6, 4), corner()
    before[..., 0] = 1.0
    after = before.clone()
    source = torch.tensor([0.0, 2.0, 0.0, 0.0])
    after[1, mask] = source
    after[2, mask] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = effectiveness(before, after, source, mask, 1)
    assert found[1] == pytest.approx((1.0, 1.0, 1.0))
    half = math.sqrt(0.5)
    assert found[2] == pytest.approx((1 - half, half, half))
    nothing = effectiveness(before, before, before[0, 0, 0], mask, 0)[0]
    assert nothing[:2] == (0.0, 0.0)
    assert math.isnan(nothing.reached)
    each = torch.stack([source if token % 2 else before[0, 0, 0] for token in range(6)])
    assert effectiveness(before, after, each, mask, 1)[1].gain == pytest.approx(0.0)


def test_decoded_differences_inside_and_outside() -> None:
    before = np.zeros((2, 24, 24, 3), dtype=np.uint8)
    after = before.copy()
    after[1, :4, :4] = 255  # the square of token 0, one of 6 inside
    after[1, 20:, 20:22, 0] = 51  # half a token outside, one of three colours, a fifth
    found = decoded_locality(before, after, corner(), 0)
    assert found[0][:2] == (0.0, 0.0)
    assert found[1][:2] == pytest.approx((1 / 6, 0.5 / 3 / 5 / 30))
    assert math.isnan(found[1].feature_inside)

    def encode(pictures: np.ndarray) -> np.ndarray:
        squares = pictures.reshape(-1, 6, 4, 6, 4, 3).mean(axis=(2, 4)) / 255
        return np.concatenate([squares, 1 - squares], axis=3)

    features = decoded_locality(before, after, corner(), 1, encode)[1]
    assert features.feature_inside == pytest.approx(1 / 6)
    assert 0 < features.feature_outside < 0.01
    with pytest.raises(UsageError, match="multiples of the grid"):
        decoded_locality(before[:, :23], after[:, :23], corner(), 0)


def test_spread_is_students() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    found = spread([*values, math.nan])
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found == pytest.approx((4, np.mean(values), np.std(values, ddof=1), low, high))
    one, none = spread([3.0]), spread([])
    assert (one.n, one.mean, none.n) == (1, 3.0, 0)
    assert all(map(math.isnan, (one.std, one.low, none.mean)))
