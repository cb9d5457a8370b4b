"""Compare samples and real images as distributions: Fréchet distance, precision, recall, coverage, Inception score.

    N, M samples, F numbers that describe a sample

Descriptions may come from any encoder; with those of Inception (`inception_features`) the Fréchet distance is FID.
Moments are updated part by part, so that N is not limited by memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.files.untrusted.arrays import parse_npz
from hierarchy_builder.files.untrusted.pickles import check_pickle
from hierarchy_builder.machine.installing import install_extras

DISTANCES_AT_ONCE = 2**24
"""Distances between samples in memory at once, 64 MiB."""


class Gaussian(NamedTuple):
    """Mean float64 [F] and covariance float64 [F, F] of a distribution."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of rows that are added in parts, merged exactly (Chan et al. 1979)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, rows: Tensor) -> None:
        """Add rows, float [n, F]."""
        values = rows.detach().cpu().double().numpy()
        if not len(values):
            return
        mean = values.mean(axis=0)
        centred, shift = values - mean, mean - self._mean
        total = self.count + len(values)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * self.count * len(values) / total
        self._mean = self._mean + shift * len(values) / total
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and covariance, divided by N − 1 as in FID. Raises TrainerError for fewer than two rows."""
        if self.count < 2:
            raise TrainerError(f"{self.count} samples have no covariance, expected 2 or more")
        return Gaussian(self._mean, self._scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, 0 or more.

    ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a^½ Σ_b Σ_a^½)^½. The root uses symmetric eigenvalues, so it
    is real and needs no offset for singular covariances, unlike a general matrix root.
    Raises MismatchError if the widths differ.
    Source: Dowson and Landau (1982); as FID: Heusel et al. (2017), arXiv 1706.08500, eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise MismatchError(
            f"distributions of {len(a.mean)} and {len(b.mean)} numbers: use the same encoder for both"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = ((a.mean - b.mean) ** 2).sum() + traces - 2 * np.sqrt(inner.clip(min=0)).sum()
    return max(float(distance), 0.0)


def read_reference(path: str | Path) -> Gaussian:
    """Read reference statistics from an npz with `mu` and `sigma`, or `ref_mu` and `ref_sigma`.

    Raises TrainerError for any other file.
    """
    try:
        with open(path, "rb") as file:
            content = parse_npz(file)
        return gaussian_of(content)
    except (OSError, ValueError) as error:
        raise TrainerError(f"reference statistics {path}: {error}") from None


def gaussian_of(content: Mapping[str, Any]) -> Gaussian:
    """Take `mu` and `sigma`, or `ref_mu` and `ref_sigma`, from arrays by name. Raises ValueError."""
    for names in (("mu", "sigma"), ("ref_mu", "ref_sigma")):
        if set(names) <= content.keys():
            try:
                mean, covariance = (np.asarray(content[name], dtype=np.float64) for name in names)
            except TypeError as error:
                raise ValueError(str(error)) from None
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ValueError(f"shapes {mean.shape} and {covariance.shape}, expected [F] and [F, F]")
            return Gaussian(mean, covariance)
    raise ValueError(f"holds {list(content)}, expected mu and sigma, or ref_mu and ref_sigma")


def precision_recall(real: Tensor, samples: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples in the manifold of real images, and share of real images in the manifold of samples.

    real: float [N, F]. samples: float [M, F]. A manifold is the union of balls around its points, each with
    the distance to its `neighbours`-th nearest other point as radius.
    Raises TrainerError for too few points.
    Source: Kynkäänniemi et al. (2019), arXiv 1904.06991.
    """
    if min(len(real), len(samples)) <= neighbours:
        raise TrainerError(
            f"{len(real)} real images and {len(samples)} samples, expected more than {neighbours} of each"
        )
    real, samples = real.double(), samples.double()
    return _within(samples, real, neighbours), _within(real, samples, neighbours)


def coverage(real: Tensor, samples: Tensor, neighbours: int = 5) -> float:
    """Share of real images with a sample nearer than their `neighbours`-th nearest other real image.

    real: float [N, F]. samples: float [M, F]. Unlike recall it cannot be raised by a few samples far from all others,
    whose large balls hold many real images. Equal distributions have, on average,
    1 − (N−1)…(N−k) / ((N+M−1)…(N+M−k)) with k neighbours: about 0.97.
    Raises TrainerError for too few real images.
    Source: Naeem et al. (2020), arXiv 2002.09797, eq. 5 and lemma 2.
    """
    if len(real) <= neighbours or not len(samples):
        raise TrainerError(
            f"{len(real)} real images and {len(samples)} samples, expected more than {neighbours} real images"
        )
    real, samples = real.double(), samples.double()
    nearest = torch.cat([part.amin(dim=1) for part in _distances(real, samples)])
    return float((nearest <= _radii(real, neighbours)).double().mean())


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class): mean and standard deviation over splits.

    logits: float [N, K], in the order of sampling; N is split into `splits` parts of equal length.
    Source: Salimans et al. (2016), arXiv 1606.03498, sec. 4.
    """
    if len(logits) < splits:
        raise TrainerError(f"{len(logits)} samples for {splits} splits, expected at least one each")
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for part in log_p.tensor_split(splits):
        marginal = part.logsumexp(dim=0) - np.log(len(part))
        scores.append(float((part.exp() * (part - marginal)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def inception_features(
    weights: str | Path | None = None,
) -> Callable[[np.ndarray], tuple[Tensor, Tensor]]:
    """torch-fidelity's Inception-v3 for FID: uint8 [B, h, w, 3] → (features [B, 2048], unbiased logits [B, 1008]).

    weights: torch-fidelity's file; None downloads it once. Raises TrainerError if the package or the file is missing.
    """
    path = None if weights is None else str(weights)
    network = load_inception(
        ["2048", "logits_unbiased"], path, "Inception Score and FID", "give a local file"
    )

    @torch.no_grad()
    def features(pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        found, logits = network(images)
        return found.cpu(), logits.cpu()

    return features


def load_inception(outputs: list[str], file: str | None, user: str, advice: str) -> Any:
    """torch-fidelity's Inception-v3, which returns these outputs, with the weights of a file or of the hub.

    user, advice: what needs it, and what to do without its weights, for messages. Raises TrainerError if the package or
    the file is missing.
    """
    try:
        fidelity: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise TrainerError(
            f"{user}: found no package torch-fidelity, which has the network: {install_extras('fid')}, or leave it out"
        ) from None
    try:
        if file is not None:
            check_pickle(Path(file))
        return fidelity.FeatureExtractorInceptionV3("inception", outputs, file)
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainerError(f"{user}: Inception weights from {file or 'the hub'}: {error}; {advice}") from None


def _radii(centres: Tensor, neighbours: int) -> Tensor:
    """Distance of each point to its `neighbours`-th nearest other one; the nearest to a point is itself."""
    return torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in _distances(centres, centres)])


def _within(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of points inside at least one ball around the centres."""
    radius = _radii(centres, neighbours)
    inside = [(part <= radius).any(dim=1) for part in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _distances(points: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Distances of points to all centres [n, M], of as many points at a time as memory is meant for."""
    for part in points.split(max(1, DISTANCES_AT_ONCE // len(centres))):
        yield torch.cdist(part, centres)
