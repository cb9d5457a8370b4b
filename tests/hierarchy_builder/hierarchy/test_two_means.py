"""2-means on Gram matrices against scikit-learn's on the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from hierarchy_builder.hierarchy.two_means import two_means


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize(("num_tokens", "num_channels"), [(256, 64), (30, 5), (7, 3), (2, 2)])
def test_two_means_equals_scikit_learn(seed: int, num_tokens: int, num_channels: int) -> None:
    random = np.random.default_rng(num_tokens)
    tokens = random.normal(size=(20, num_tokens, num_channels)) + random.normal(size=num_channels)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    expected = [KMeans(2, n_init=1, random_state=seed).fit_predict(image) for image in tokens]
    labels = two_means(tokens @ tokens.swapaxes(1, 2), seed, num_channels)
    np.testing.assert_array_equal(labels, expected)


def test_two_means_of_equal_tokens_is_one_cluster() -> None:
    assert not two_means(np.full((1, 9, 9), 0.5), 0, 4).any()
