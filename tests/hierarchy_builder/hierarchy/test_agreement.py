"""Scores of agreement against scikit-learn, closed forms and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.hierarchy.agreement import (
    adjusted_rand,
    boundaries,
    boundary_f,
    covering,
    object_iou,
    variation_of_information,
)

partitions = arrays(np.int64, (3, 4, 5), elements=st.integers(0, 6))


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """60 images of 8×8 with up to 9 regions, from unrelated to equal."""
    random = np.random.default_rng(0)
    a = random.integers(0, 9, (60, 8, 8))
    keep = random.random((60, 1, 1)) > random.random((60, 8, 8))
    return a, np.where(keep, a, random.integers(0, 5, a.shape))


def test_adjusted_rand_equals_scikit_learn(pair) -> None:
    a, b = pair
    expected = [adjusted_rand_score(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(adjusted_rand(a, b), expected, atol=1e-12)


def test_variation_of_information_equals_entropies_minus_mutual_information(pair) -> None:
    a, b = pair
    expected = [
        entropy(np.bincount(x)) + entropy(np.bincount(y)) - 2 * mutual_info_score(x, y)
        for x, y in zip(a.reshape(60, -1), b.reshape(60, -1), strict=True)
    ]
    np.testing.assert_allclose(variation_of_information(a, b), expected, atol=1e-12)


def test_scores_equal_closed_forms() -> None:
    whole, halves = np.zeros((1, 4, 4), int), np.repeat([[[0], [0], [1], [1]]], 4, axis=2)
    quarters = halves * 2 + halves.swapaxes(1, 2)
    assert variation_of_information(halves, quarters)[0] == pytest.approx(np.log(2))
    assert variation_of_information(whole, quarters)[0] == pytest.approx(np.log(4))
    assert adjusted_rand(whole, whole)[0] == 1
    assert adjusted_rand(whole, quarters)[0] == 0
    assert adjusted_rand(np.arange(16).reshape(1, 4, 4), np.arange(16)[::-1].reshape(1, 4, 4))[0] == 1


def test_large_maps_do_not_overflow() -> None:
    """Squares of pair counts of 512×512 cells pass 2⁶³."""
    halves = np.repeat(np.arange(512) // 256, 512).reshape(1, 512, 512)
    assert adjusted_rand(halves, halves)[0] == 1
    assert abs(adjusted_rand(halves, halves.swapaxes(1, 2))[0]) < 1e-4


@settings(max_examples=60, deadline=None)
@given(partitions, partitions, st.permutations(range(7)))
def test_scores_are_symmetric_bounded_and_independent_of_ids(a, b, names) -> None:
    renamed = np.array(names)[a]
    for score in (adjusted_rand, variation_of_information):
        np.testing.assert_allclose(score(a, b), score(b, a), atol=1e-12)
        np.testing.assert_allclose(score(a, b), score(renamed, b), atol=1e-12)
        np.testing.assert_allclose(score(a, b)[1:], score(a[1:], b[1:]), atol=1e-12)
    assert (adjusted_rand(a, renamed) == 1).all()
    np.testing.assert_allclose(variation_of_information(a, renamed), 0, atol=1e-12)
    assert (adjusted_rand(a, b) <= 1).all()
    assert (variation_of_information(a, b) <= np.log(20) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(partitions, partitions, partitions)
def test_variation_of_information_is_a_metric(a, b, c) -> None:
    direct = variation_of_information(a, c)
    assert (direct <= variation_of_information(a, b) + variation_of_information(b, c) + 1e-12).all()


def test_covering_equals_brute_force(pair) -> None:
    segments, drawn = pair
    humans = [np.stack([drawn[n], segments[(n + 1) % 60]])[: n % 3] for n in range(60)]
    expected = [
        np.mean([_covering(segments[n], one) for one in maps]) if len(maps) else np.nan
        for n, maps in enumerate(humans)
    ]
    np.testing.assert_allclose(covering(segments, humans), expected, atol=1e-12)


def test_object_iou_of_a_mask_with_background() -> None:
    drawn = np.zeros((2, 6, 6), int)
    drawn[0, :, :3], drawn[1, :, :2], drawn[1, :, 2:4] = 5, 1, 2
    objects = np.zeros((1, 6, 6), bool)
    objects[0, :, 1:4] = True
    assert object_iou(objects, [drawn[:1]])[0] == pytest.approx(2 / 4)
    assert object_iou(objects, [drawn])[0] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert object_iou(objects | True, [drawn[:1]])[0] == pytest.approx(1 / 2)
    assert object_iou(~(objects | True), [drawn[:1]])[0] == 0


def test_object_iou_without_background_takes_the_best_union_of_segments() -> None:
    random = np.random.default_rng(1)
    drawn = random.integers(1, 6, (20, 1, 5, 5))
    objects = random.random((20, 5, 5)) < 0.4
    for n, found in enumerate(object_iou(objects, list(drawn))):
        chosen = itertools.chain.from_iterable(itertools.combinations(range(1, 6), k) for k in range(1, 6))
        unions = [np.isin(drawn[n, 0], ids) for ids in chosen]
        best = max((objects[n] & union).sum() / (objects[n] | union).sum() for union in unions)
        assert found == pytest.approx(best)


def test_boundaries_lie_left_of_and_above_a_change() -> None:
    labels = np.zeros((1, 4, 4), int)
    labels[0, 2:, 2:] = 1
    expected = np.zeros((4, 4), bool)
    expected[1, 1:] = expected[1:, 1] = True
    np.testing.assert_array_equal(boundaries(labels)[0], expected)


def test_boundary_matching_equals_brute_force() -> None:
    """Against the largest set of disjoint pairs, found by trying all."""
    random = np.random.default_rng(2)
    for _ in range(30):
        segments = random.integers(0, 2, (1, 3, 3))
        drawn = random.integers(0, 2, (2, 3, 3))
        ours, theirs = boundaries(segments)[0], boundaries(drawn)
        if not ours.any() or not theirs.any():
            continue
        matched = [_largest_matching(ours, one, 1.0) for one in theirs]
        found = boundary_f(segments, [drawn], tolerance=1.0)
        assert found.recall[0] == pytest.approx(sum(matched) / theirs.sum())
        assert max(matched) / ours.sum() <= found.precision[0] <= min(1, sum(matched) / ours.sum())


def test_boundaries_match_one_to_one_within_the_tolerance() -> None:
    ours, drawn = np.zeros((1, 8, 12), int), np.zeros((1, 8, 12), int)
    ours[:, :, 6:] = 1
    drawn[:, :, 8:] = 1
    for tolerance, score in ((1.9, 0), (2.0, 1)):
        assert [value[0] for value in boundary_f(ours, [drawn], tolerance)] == [score] * 3
    doubled = drawn.copy()
    doubled[:, :, 7] = 2  # outlines at 6 and 7: each cell of ours pairs with one of them only
    precision, recall, f = (value[0] for value in boundary_f(ours, [doubled]))
    assert (precision, recall, f) == (1, 0.5, pytest.approx(2 / 3))


def test_boundary_precision_counts_a_match_with_any_map() -> None:
    ours, one, other = (np.zeros((1, 8, 16), int) for _ in range(3))
    ours[:, :, 4:], one[:, :, 4:], other[:, :, 12:] = 1, 1, 1
    ours[:, :, 12:] = 2
    precision, recall, _ = boundary_f(ours, [np.concatenate([one, other])])
    assert (precision[0], recall[0]) == (1, 1)
    precision, recall, _ = boundary_f(one, [np.concatenate([one, other])])
    assert (precision[0], recall[0]) == (1, 0.5)


def test_boundary_scores_without_outlines_or_maps() -> None:
    flat, split = np.zeros((1, 4, 4), int), np.repeat([[[0, 0, 1, 1]]], 4, axis=1)
    assert [value[0] for value in boundary_f(flat, [flat])] == [1, 1, 1]
    assert [value[0] for value in boundary_f(split, [flat])] == [0, 0, 0]
    assert [value[0] for value in boundary_f(flat, [split])] == [0, 0, 0]
    nobody = [flat[:0]]
    assert np.isnan(boundary_f(split, nobody)).all()
    assert np.isnan([covering(split, nobody)[0], object_iou(split > 0, nobody)[0]]).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    a = np.zeros((2, 4, 4), int)
    with pytest.raises(BuilderError, match=r"shapes \(2, 4, 4\) and \(2, 3, 4\)"):
        adjusted_rand(a, a[:, 1:])
    with pytest.raises(BuilderError, match="negative ids"):
        variation_of_information(a - 1, a)
    with pytest.raises(BuilderError, match="found 1 sets"):
        covering(a, [a])
    with pytest.raises(BuilderError, match=r"expected 2 sets of the size of the partitions, \(4, 4\)"):
        boundary_f(a, [a, a[:, 1:]])


def _covering(segments: np.ndarray, drawn: np.ndarray) -> float:
    total = 0.0
    for region in np.unique(drawn):
        inside = drawn == region
        overlaps = [
            (inside & (segments == s)).sum() / (inside | (segments == s)).sum() for s in np.unique(segments)
        ]
        total += inside.sum() * max(overlaps)
    return total / drawn.size


def _largest_matching(ours: np.ndarray, drawn: np.ndarray, tolerance: float) -> int:
    def extend(cells: list, taken: frozenset) -> int:
        if not cells:
            return 0
        first, rest = cells[0], cells[1:]
        best = extend(rest, taken)
        for cell in map(tuple, np.argwhere(drawn)):
            near = (cell[0] - first[0]) ** 2 + (cell[1] - first[1]) ** 2 <= tolerance**2
            if near and cell not in taken:
                best = max(best, 1 + extend(rest, taken | {cell}))
        return best

    return extend([tuple(cell) for cell in np.argwhere(ours)], frozenset())
