"""What a recipe may ask for beside the published one: starts, objects, connected regions, label maps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_hierarchy import partition, smooth_features
from sklearn.cluster import KMeans

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.fields import config_hash, from_mapping, identity, to_mapping
from hierarchy_builder.hierarchy.linkage import average_linkage, cut_merges
from hierarchy_builder.hierarchy.normalized_cut import SHARPNESS, centred_cut, normalized_cut
from hierarchy_builder.hierarchy.recipe import Flag, build_hierarchy, check_nesting, cut_levels, given_levels
from hierarchy_builder.hierarchy.two_means import two_means


def grams(features: np.ndarray) -> np.ndarray:
    tokens = features.reshape(len(features), -1, features.shape[-1]).astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens @ tokens.swapaxes(1, 2)


def inertia(gram: np.ndarray, labels: np.ndarray) -> float:
    within = [
        gram[np.ix_(labels == k, labels == k)].sum() / (labels == k).sum() for k in set(labels.tolist())
    ]
    return float(np.trace(gram) - sum(within))


def test_several_starts_keep_the_least_inertia() -> None:
    features = smooth_features(30, 8, 8, 16, 0.5)
    gram = grams(features)
    single, several = two_means(gram, 0, 16), two_means(gram, 0, 16, 8)
    least = [
        KMeans(2, n_init=50, random_state=0).fit(image.reshape(64, -1)).inertia_
        for image in features.astype(np.float64)
        / np.linalg.norm(features.astype(np.float64), axis=-1, keepdims=True)
    ]
    of_single, of_several = (
        np.array([inertia(*pair) for pair in zip(gram, labels, strict=True)]) for labels in (single, several)
    )
    assert (of_several <= of_single + 1e-9).all()
    assert (of_several < of_single - 1e-6).any()
    assert of_several.mean() <= np.mean(least) * 1.005


def second_eigenvector(gram: np.ndarray) -> np.ndarray:
    weights = np.exp(SHARPNESS * (gram - 1))
    degrees = weights.sum(axis=1)
    _, vectors = np.linalg.eigh(weights / np.sqrt(degrees[:, None] * degrees))
    return vectors[:, -2] / np.sqrt(degrees)


@pytest.mark.parametrize(("grid", "noise"), [((16, 16), 0.5), ((16, 16), 2.0), ((3, 4), 1.0), ((1, 2), 1.0)])
def test_the_cut_divides_the_second_eigenvector(grid: tuple[int, int], noise: float) -> None:
    gram = grams(smooth_features(12, *grid, 24, noise))
    for image, labels in zip(gram, normalized_cut(gram), strict=True):
        score = second_eigenvector(image)
        weight = np.exp(SHARPNESS * (image - 1)).sum(axis=1)
        ranked = np.argsort(score)
        costs = []
        for size in range(1, len(score)):
            halves = ranked[:size], ranked[size:]
            means = [np.average(score[half], weights=weight[half]) for half in halves]
            costs.append(
                sum(
                    (weight[half] * (score[half] - mean) ** 2).sum()
                    for half, mean in zip(halves, means, strict=True)
                )
            )
        expected = np.zeros(len(score), dtype=np.uint8)
        expected[ranked[np.argmin(costs) + 1 :]] = 1
        assert (labels == expected).all() or (labels == 1 - expected).all()


def test_the_cut_finds_two_equal_halves() -> None:
    """Every token has the same degree, so nothing but the graph itself tells the halves apart."""
    tokens = np.zeros((1, 4, 4, 2), dtype=np.float32)
    tokens[:, :2, :, 0] = 1
    tokens[:, 2:, :, 1] = 1
    labels = normalized_cut(grams(tokens)).reshape(4, 4)
    assert len(set(labels[:2].ravel())) == len(set(labels[2:].ravel())) == 1
    assert labels[0, 0] != labels[3, 3]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_cut_does_not_depend_on_the_order_of_tokens(seed: int) -> None:
    gram = grams(smooth_features(2, 8, 8, 16, 1.0, seed))
    order = np.random.default_rng(seed).permutation(64)
    shuffled = normalized_cut(gram[:, order][:, :, order])
    np.testing.assert_array_equal(
        partition(shuffled.reshape(-1, 8, 8)), partition(normalized_cut(gram)[:, order].reshape(-1, 8, 8))
    )


def test_the_centred_cut_is_the_one_that_separates_the_centre_best() -> None:
    gram = grams(smooth_features(8, 12, 12, 24, 1.0))
    away = np.hypot(*(np.indices((12, 12)) / 11 - 0.5)).ravel()
    variance = 1 - gram.mean(axis=(1, 2))
    cuts = np.stack([normalized_cut(gram, bandwidth / variance) for bandwidth in (1.0, 2.0, 3.0)])
    separation = np.abs([[np.corrcoef(labels, away)[0, 1] for labels in cut] for cut in cuts])
    found = centred_cut(gram, away)
    np.testing.assert_array_equal(found, cuts[separation.argmax(axis=0), np.arange(8)])
    assert len(set(separation.argmax(axis=0).tolist())) > 1


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 7.0]), contrast=st.sampled_from([0.5, 0.05]))
def test_stable_is_the_same_for_an_encoder_of_other_scale(seed: int, scale: float, contrast: float) -> None:
    """Rotated, multiplied, and with a channel that all tokens share, which brings all cosines nearer to 1 alike."""
    features = smooth_features(3, 10, 10, 16, 1.0, seed).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    shared = np.full_like(unit[..., :1], np.sqrt(1 - contrast))
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(17, 17)))[0].astype(np.float32)
    other = scale * np.concatenate([np.sqrt(contrast) * unit, shared], axis=-1) @ rotation
    recipe = HierarchyRecipe.stable()
    found, again = build_hierarchy(features, recipe), build_hierarchy(other, recipe)
    np.testing.assert_array_equal(again.regions, found.regions)
    np.testing.assert_array_equal(build_hierarchy(features[1:], recipe).regions, found.regions[1:])
    assert not check_nesting(found.regions).any()


def test_a_number_of_regions_cuts_at_the_mean_of_the_highest_merges() -> None:
    features = smooth_features(5, 10, 10, 16, 1.0)
    everything = np.ones((5, 100), dtype=np.uint8)
    merges = average_linkage(grams(features), everything, np.zeros((100, 100)))
    levels = cut_merges(everything, merges, (4, 10, 60))
    for tree, image in zip(merges, levels, strict=True):
        heights = np.sort(tree[:, 2].astype(np.float64))[::-1]
        expected = [1 + (heights > heights[:number].mean()).sum() for number in (8, 20, 120)]
        assert image.max(axis=1).tolist() == expected


def test_busy_photos_get_more_regions() -> None:
    """Three flat patches, and the same with a fourth in one of them; both are asked for eight regions."""
    features = np.zeros((2, 8, 8, 4), dtype=np.float32)
    features[:, :4, :, 0] = features[:, 4:, :4, 1] = features[:, 4:, 4:, 2] = 1
    features[1, 1:3, 2:6] = [0, 0, 0, 1]
    features += 0.01 * np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    regions = build_hierarchy(features, dataclasses.replace(HierarchyRecipe.stable(), cuts=(8,))).regions
    assert regions.max(axis=(2, 3))[:, 1].tolist() == [2, 3]  # ids from 0


def test_stable_recipe_mirrors_with_the_image() -> None:
    features = smooth_features(6, 12, 12, 32, 0.8)
    recipe = HierarchyRecipe.stable()
    plain, mirrored = build_hierarchy(features, recipe), build_hierarchy(features[:, :, ::-1].copy(), recipe)
    np.testing.assert_array_equal(partition(mirrored.regions[..., ::-1]), partition(plain.regions))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    start=st.sampled_from(["single", "several", "cut", "centred"]),
    object_choice=st.sampled_from(["centre", "border"]),
    connected=st.booleans(),
    divide_background=st.booleans(),
    min_spread=st.sampled_from([0.0, 0.05]),
    cuts=st.sampled_from([(0.8, 0.5, 0.2), (2, 5, 9)]),
    noise=st.sampled_from([0.0, 0.3, 2.0]),
    seed=st.integers(0, 100),
)
def test_any_recipe_keeps_the_rules(grid, noise, seed, **fields) -> None:
    features = smooth_features(3, *grid, 8, noise, seed)
    features[0] = features[0, :1, :1]
    recipe = HierarchyRecipe(**fields)
    hierarchy = build_hierarchy(features, recipe)
    assert not check_nesting(hierarchy.regions).any()
    assert hierarchy.flags[0] == Flag.DEGENERATE
    if fields["min_spread"]:
        assert (hierarchy.regions[0] == 1).all()
    for level in hierarchy.regions.reshape(-1, grid[0] * grid[1]):
        first_seen = list(dict.fromkeys(level.tolist()))
        objects = [region for region in first_seen if region > 0]
        if not fields["divide_background"]:
            assert objects == list(range(1, len(objects) + 1))
    again = cut_levels(hierarchy.regions[:, 0], hierarchy.merges, recipe.cuts)
    np.testing.assert_array_equal(again, hierarchy.regions)


def test_a_divided_background_has_ids_after_the_object() -> None:
    features = smooth_features(4, 12, 12, 16, 1.0)
    plain = build_hierarchy(features, HierarchyRecipe(cuts=(0.3,)))
    divided = build_hierarchy(features, HierarchyRecipe(cuts=(0.3,), divide_background=True))
    np.testing.assert_array_equal(divided.regions[:, 0], plain.regions[:, 0])
    for objects, level in zip(divided.regions[:, 0], divided.regions[:, 1], strict=True):
        in_object = list(dict.fromkeys(level[objects == 1].tolist()))
        behind = list(dict.fromkeys(level[objects == 0].tolist()))
        assert in_object == list(range(1, len(in_object) + 1))
        assert behind == [0, *range(len(in_object) + 1, len(in_object) + len(behind))]
        assert len(behind) > 1


def test_border_choice_takes_the_half_away_from_the_border() -> None:
    features = np.zeros((1, 8, 8, 2), dtype=np.float32)
    features[..., 0] = 1
    features[0, 1:7, 1:3] = [0, 1]  # off centre: the rest is nearer to it on average
    features[0, 1, 3:7] = [0, 1]
    features[0, 6, 3:7] = [0, 1]
    drawn = features[0, ..., 1] == 1
    centre = build_hierarchy(features, HierarchyRecipe(cuts=())).regions[0, 0]
    border = build_hierarchy(features, HierarchyRecipe(cuts=(), object_choice="border")).regions[0, 0]
    np.testing.assert_array_equal(border == 1, drawn)
    from_centre = np.hypot(*(np.indices((8, 8)) / 7 - 0.5))
    assert (centre == drawn).all() == (from_centre[drawn].mean() <= from_centre[~drawn].mean())


def test_image_below_min_spread_is_one_region() -> None:
    features = np.ones((2, 6, 6, 16), dtype=np.float32)
    features += 0.01 * np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    features[1] = smooth_features(1, 6, 6, 16, 0.3)[0]
    plain = build_hierarchy(features, HierarchyRecipe())
    guarded = build_hierarchy(features, HierarchyRecipe(min_spread=1e-3))
    assert plain.regions[0].max() > 1
    assert plain.flags.tolist() == [0, 0]
    assert (guarded.regions[0] == 1).all()
    assert guarded.flags.tolist() == [Flag.DEGENERATE, 0]
    np.testing.assert_array_equal(guarded.regions[1], plain.regions[1])
    assert plain.scores[0, 0] == pytest.approx(1e-4, rel=0.2)  # 0.01² against a length of 1


def test_scores_are_spread_and_share_explained_by_the_object() -> None:
    features = smooth_features(3, 6, 6, 8, 0.4)
    hierarchy = build_hierarchy(features)
    for gram, mask, (contrast, explained) in zip(
        grams(features), hierarchy.regions[:, 0], hierarchy.scores, strict=True
    ):
        total = 36 - gram.sum() / 36
        assert contrast == pytest.approx(total / 36, rel=1e-4)
        assert explained == pytest.approx(1 - inertia(gram, mask.ravel()) / total, rel=1e-3)


def with_masks(level: int, **fields: object) -> HierarchyRecipe:
    return HierarchyRecipe(masks="drawn", masks_level=level, **fields)  # type: ignore[arg-type]


def test_masks_give_the_object() -> None:
    features = smooth_features(3, 8, 8, 16, 0.5)
    masks = np.random.default_rng(0).integers(4, size=(3, 8, 8))
    masks[1], masks[2] = -1, 0  # none, and one in which nothing is drawn
    hierarchy = build_hierarchy(features, with_masks(0), masks)
    plain = build_hierarchy(features)
    np.testing.assert_array_equal(hierarchy.regions[0, 0], masks[0] > 0)
    assert hierarchy.flags.tolist() == [0, Flag.NO_MASK, Flag.NO_MASK]
    np.testing.assert_array_equal(hierarchy.regions[1:], plain.regions[1:])


@pytest.mark.parametrize("fields", [{}, {"connected": True, "divide_background": True}])
@pytest.mark.parametrize("level", [1, 2])
def test_masks_give_any_level(level: int, fields: dict[str, bool]) -> None:
    features = smooth_features(4, 10, 10, 16, 0.5)
    masks = np.random.default_rng(1).integers(5, size=(4, 5, 5)).repeat(2, axis=1).repeat(2, axis=2)
    masks[3] = -1
    recipe = with_masks(level, cuts=(0.7, 0.5, 0.1), **fields)
    hierarchy = build_hierarchy(features, recipe, masks)
    assert not check_nesting(hierarchy.regions).any()
    np.testing.assert_array_equal(hierarchy.regions[:3, 0], masks[:3] > 0)
    np.testing.assert_array_equal(partition(hierarchy.regions[:3, level]), partition(masks[:3]))
    counts = hierarchy.regions[:3].max(axis=(2, 3))
    assert (counts[:, 3] > counts[:, level]).all()
    alone = build_hierarchy(features[3:], HierarchyRecipe(cuts=recipe.cuts, **fields))  # type: ignore[arg-type]
    np.testing.assert_array_equal(hierarchy.regions[3], alone.regions[0])
    levels = given_levels(hierarchy.flags, recipe)
    assert levels.tolist() == [level] * 3 + [0]
    again = cut_levels(hierarchy.regions[:, 0], hierarchy.merges, recipe.cuts, levels)
    np.testing.assert_array_equal(again, hierarchy.regions)


def test_masks_without_masks_in_the_recipe_are_refused() -> None:
    features = smooth_features(2, 4, 4, 8, 0.5)
    with pytest.raises(
        BuilderError, match=r"masks are None, but label maps were passed: pass both or neither"
    ):
        build_hierarchy(features, HierarchyRecipe(), np.zeros((2, 4, 4), dtype=np.int64))
    with pytest.raises(BuilderError, match=r"masks are 'drawn', but label maps were not passed"):
        build_hierarchy(features, with_masks(0))
    with pytest.raises(
        BuilderError, match=r"masks have shape \(2, 4, 5\), expected \[N, H, W\] = \(2, 4, 4\)"
    ):
        build_hierarchy(features, with_masks(0), np.zeros((2, 4, 5), dtype=np.int64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cuts": (0.3, 0.6)}, "expected falling heights"),
        ({"cuts": (1.2,)}, "relative heights from 0 to 1, or numbers from 2 to 255"),
        ({"cuts": (8, 8.5)}, "relative heights from 0 to 1, or numbers from 2 to 255"),
        ({"cuts": (0.5, 8)}, "relative heights from 0 to 1, or numbers from 2 to 255"),
        ({"cuts": (8, 256)}, "relative heights from 0 to 1, or numbers from 2 to 255"),
        ({"cuts": (16, 8)}, "expected rising numbers"),
        ({"cuts": (0.5,), "masks_level": 2}, "masks_level is 2, expected 0 to 1"),
        ({"connected": True, "spatial_weight": 4.0}, "expected 3 or less with connected"),
        ({"min_spread": -1.0}, "min_spread is -1.0, expected 0 to 1"),
    ],
)
def test_invalid_recipe_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchyRecipe(**fields)  # type: ignore[arg-type]


def test_recipes_of_earlier_builds_keep_their_identity() -> None:
    """Their builds can be continued; `stable` was the second one until its cuts became numbers of regions."""
    earlier = HierarchyRecipe(
        cuts=(0.7, 0.52),
        spatial_weight=0.0,
        start="cut",
        object_choice="border",
        connected=True,
        divide_background=True,
        min_spread=1e-3,
    )
    assert config_hash(identity(HierarchyRecipe.paper()))[:16] == "192178eb9c0321d8"
    assert config_hash(identity(earlier))[:16] == "be34bfdb11697498"
    written = to_mapping(HierarchyRecipe(cuts=(8, 16)))
    assert identity(from_mapping(HierarchyRecipe, written)) == identity(HierarchyRecipe(cuts=(8.0, 16.0)))
    assert written["cuts"] == [8.0, 16.0]


def test_stable_regions_are_tighter_on_real_photos(shared: Path) -> None:
    features = np.load(shared / "golden/hierarchy/features.npz")["features"][:32]
    tokens = features.reshape(32, 256, -1).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    explained = {}
    for name, recipe in (("paper", HierarchyRecipe.paper()), ("stable", HierarchyRecipe.stable())):
        hierarchy = build_hierarchy(features, recipe)
        assert not hierarchy.flags.any()
        ids = hierarchy.regions[:, 2].reshape(32, 256)
        means = [
            [image[ids[n] == k].mean(axis=0) for k in range(ids[n].max() + 1)]
            for n, image in enumerate(tokens)
        ]
        explained[name] = np.mean(
            [(image * np.array(means[n])[ids[n]]).sum(axis=1).mean() for n, image in enumerate(tokens)]
        )
    assert explained["stable"] > explained["paper"]
