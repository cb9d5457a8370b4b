"""Fréchet distance, precision, recall and Inception score against closed forms."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.machine.installing import install_extras
from trainer.metrics.frechet import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_features,
    inception_score,
    precision_recall,
    read_reference,
)


def random_gaussian(seed: int, width: int = 6, rank: int = 6) -> Gaussian:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(width, rank))
    return Gaussian(random.normal(size=width), factor @ factor.T)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    a = Gaussian(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([0.0, 4.0]), np.diag([1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [6, 2])
def test_full_covariances_match_the_matrix_root(rank: int) -> None:
    a, b = random_gaussian(0, rank=rank), random_gaussian(1)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)


def test_moments_do_not_depend_on_parts() -> None:
    rows = torch.randn(101, 5, generator=torch.Generator().manual_seed(0)) + 100
    moments = Moments(5)
    for part in rows.split([1, 0, 40, 60]):
        moments.add(part)
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, rows.double().mean(dim=0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.double().numpy().T), rtol=1e-9)
    assert moments.count == 101
    one = Moments(5)
    one.add(rows[:1])
    with pytest.raises(TrainerError, match="1 samples have no covariance"):
        one.gaussian()


def test_references_of_both_names(tmp_path: Path) -> None:
    a = random_gaussian(0)
    np.savez(tmp_path / "a.npz", mu=a.mean, sigma=a.covariance)
    np.savez(tmp_path / "b.npz", ref_mu=a.mean, ref_sigma=a.covariance, other=1)
    for name in ("a.npz", "b.npz"):
        assert frechet_distance(read_reference(tmp_path / name), a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(MismatchError, match="of 6 and 3 numbers"):
        frechet_distance(a, random_gaussian(0, width=3))
    np.savez(tmp_path / "c.npz", mu=a.mean)
    with pytest.raises(TrainerError, match="expected mu and sigma, or ref_mu and ref_sigma"):
        read_reference(tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", mu=a.mean, sigma=a.mean)
    with pytest.raises(TrainerError, match=r"expected \[F\] and \[F, F\]"):
        read_reference(tmp_path / "c.npz")
    (tmp_path / "c.npz").write_bytes(b"text")
    with pytest.raises(TrainerError, match="reference statistics"):
        read_reference(tmp_path / "c.npz")


def test_precision_and_recall_of_planted_points() -> None:
    real = torch.arange(10.0)[:, None]
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    # Samples sit on the first five only; their balls of radius 3 reach to 7 where real images stand.
    near = torch.arange(5.0)[:, None]
    precision, recall = precision_recall(real, near)
    assert (precision, recall) == (1.0, 0.8)
    far = near + 1000
    assert precision_recall(real, far) == (0.0, 0.0)
    assert precision_recall(real, torch.cat([near, far]), neighbours=1)[0] == 0.5
    with pytest.raises(TrainerError, match="expected more than 3 of each"):
        precision_recall(real, real[:3])


def test_inception_score_counts_classes() -> None:
    sure = 100 * torch.eye(4).repeat(10, 1)
    assert inception_score(sure, splits=10) == pytest.approx((4.0, 0.0), abs=1e-9)
    assert inception_score(torch.zeros(20, 7), splits=2) == pytest.approx((1.0, 0.0))
    with pytest.raises(TrainerError, match="5 samples for 10 splits"):
        inception_score(torch.zeros(5, 7))


def test_inception_gets_what_it_expects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interface of torch-fidelity's extractor: uint8 [B, 3, h, w] in, one tensor for each name asked for out."""
    asked = []

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], weights: str | None) -> None:
            super().__init__()
            asked.append((features_list, weights))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert (images.dtype, images.shape[1]) == (torch.uint8, 3)
            means = images.float().mean(dim=(2, 3))
            return means, -means

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pictures = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    pictures[1, ..., 2] = 9
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2)}, file)
    features, logits = inception_features(file)(pictures)
    assert features.tolist() == [[0, 0, 0], [0, 0, 9]]
    assert torch.equal(logits, -features)
    assert asked == [(["2048", "logits_unbiased"], str(file))]
    torch.save({"a": np.ones(2)}, file)  # a pickle of more than tensors is not given to the package
    with pytest.raises(TrainerError, match="no part of a tensor"):
        inception_features(file)
    assert len(asked) == 1


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is there")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(TrainerError, match=re.escape(install_extras("fid"))):
        inception_features()
