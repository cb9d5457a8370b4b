"""Variance within classes and coverage against closed forms: Gaussians, equal images, planted points."""

from __future__ import annotations

import math

import pytest
import torch

from hierarchy_builder.errors import TrainerError
from trainer.metrics.frechet import coverage
from trainer.metrics.variety import MEMORY_BYTES, WithinClasses, measured_classes, variety

ONES = torch.ones(3, dtype=torch.float64)
SHAPE = (2, 6, 6, 3)


def drawn(
    counts: dict[int, int], std: float | torch.Tensor = 1.0, seed: int = 0, classes: tuple[int, ...] = (0, 1)
) -> WithinClasses:
    """Images N(100·label, std²): the classes lie far apart, which must not count as variance within them."""
    generator, found = torch.Generator().manual_seed(seed), WithinClasses(classes)
    labels = [label for label, count in counts.items() for _ in range(count)]
    images = torch.stack([torch.randn(SHAPE, generator=generator) * std + 100 * label for label in labels])
    for part in (slice(None, None, 2), slice(1, None, 2)):  # in parts, classes mixed
        found.add(images[part], labels[part])
    return found


def test_the_ratio_of_gaussians_is_that_of_their_variances() -> None:
    real = drawn({0: 200, 1: 100}, std=2.0)
    # 108 numbers of each of 300 images on a level: the standard error of the ratio is below 1 %.
    assert variety(drawn({0: 40, 1: 40}, std=0.5, seed=1), real, ONES) == pytest.approx(
        [1 / 16] * 2, rel=0.05
    )
    assert variety(drawn({0: 90, 1: 90}, std=2.0, seed=1), real, ONES) == pytest.approx([1.0] * 2, rel=0.05)


def test_it_is_unbiased_for_two_images() -> None:
    """Divided by n instead of n − 1, two images would show half of the variance."""
    classes = tuple(range(300))
    ours, real = (drawn(dict.fromkeys(classes, 2), seed=seed, classes=classes) for seed in (1, 2))
    assert float(torch.stack([ours.variance(label) for label in classes]).mean()) == pytest.approx(
        1, rel=0.03
    )
    assert variety(ours, real, ONES) == pytest.approx([1.0] * 2, rel=0.03)


def test_variety_is_0_for_equal_samples_and_1_for_the_real_images() -> None:
    real, equal = drawn({0: 10, 1: 5}), WithinClasses((0, 1))
    equal.add(torch.randn(SHAPE).expand(6, *SHAPE), [0, 0, 0, 1, 1, 1])
    assert variety(equal, real, ONES) == [0.0, 0.0]
    assert variety(real, real, ONES) == [1.0, 1.0]
    assert all(math.isnan(ratio) for ratio in variety(real, equal, ONES))


def test_classes_count_by_their_real_images_on_both_sides() -> None:
    real, ours = drawn({0: 30, 1: 10}), drawn({0: 4, 1: 40}, seed=1)
    level = torch.stack([30 * side.variance(0) + 10 * side.variance(1) for side in (ours, real)]).mean(dim=2)
    assert variety(ours, real, ONES) == pytest.approx((level[0] / level[1]).tolist())


def test_a_class_needs_two_images_on_both_sides() -> None:
    real = drawn({0: 10, 1: 1})
    one = drawn({0: 1, 1: 9}, seed=1)
    assert variety(one, real, ONES) == []
    both = drawn({0: 3, 1: 9}, seed=1)
    expected = (both.variance(0).mean(dim=1) / real.variance(0).mean(dim=1)).tolist()
    assert variety(both, real, ONES) == pytest.approx(expected)
    assert (one.count(0), one.count(1), one.count(7)) == (1, 9, 0)


def test_units_of_channels_decide_their_weight() -> None:
    """A channel of large numbers decides alone in raw units, and counts as any other in its own."""
    scale = torch.tensor([100.0, 1.0, 1.0])
    real = drawn({0: 400}, std=scale)
    ours = drawn({0: 400}, std=scale * torch.tensor([1.0, 0.1, 0.1]), seed=1)
    assert variety(ours, real, ONES) == pytest.approx([1.0] * 2, rel=0.05)
    assert variety(ours, real, scale.double() ** 2) == pytest.approx([(1 + 0.01 + 0.01) / 3] * 2, rel=0.05)


def test_unmeasured_classes_are_skipped_and_memory_is_limited() -> None:
    assert drawn({0: 3, 1: 3}, classes=(1,)).measurable == {1}
    assert measured_classes([5, 3, 3, 9], 100) == [3, 5, 9]
    assert measured_classes(range(1000), MEMORY_BYTES // 16) == [0, 333, 666, 999]
    assert measured_classes([4, 8], MEMORY_BYTES) == [4]


def test_coverage_of_planted_points() -> None:
    real = torch.arange(20.0)[:, None]
    assert coverage(real, real) == 1.0
    assert coverage(real, real + 1000) == 0.0
    # The 5th neighbour of a real image is 3 away, so one sample at 9.4 covers the images 7 to 12.
    assert coverage(real, torch.tensor([[9.4]])) == 6 / 20
    with pytest.raises(TrainerError, match="expected more than 5 real images"):
        coverage(real[:5], real)


def test_coverage_of_equal_distributions_has_a_closed_form() -> None:
    """Lemma 2 of Naeem et al. (2020), in any dimension."""
    n, m, k = 60, 40, 5
    generator = torch.Generator().manual_seed(0)
    measured = [
        coverage(torch.randn(n, 4, generator=generator), torch.randn(m, 4, generator=generator), k)
        for _ in range(200)
    ]
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    assert sum(measured) / len(measured) == pytest.approx(expected, abs=0.01)
