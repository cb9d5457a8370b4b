"""Compare samples with real images as two distributions: their variety, Fréchet distances, FID and inception score.

    L levels (coarse → fine), H×W grid, C channels, h×w pixels

Variety is the variance within classes, and precision, recall and coverage of the mean tokens of images. Canvases are
compared in the feature space of the model's own encoder, decoded pictures in that of any encoder. Of a set of images,
only moments and one vector for each image are kept, so that it need not fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.metrics.frechet import (
    Gaussian,
    Moments,
    coverage,
    frechet_distance,
    inception_score,
    precision_recall,
)
from trainer.metrics.variety import WithinClasses, variety
from trainer.trajectories.photos import Encoder, encoded_by

Inception = Callable[[np.ndarray], tuple[Tensor, Tensor]]
"""uint8 [B, h, w, 3] → (features [B, F], logits [B, K])."""
NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5
"""Neighbours of precision and recall, and of coverage: the numbers of their papers."""
SPLITS = 10
TOKENS_PER_IMAGE = 32
"""Tokens of each image that enter the moments of tokens, chosen at random. Neighbouring tokens resemble each other, so
all of them would add little and cost eight times as much."""


class Crowd:
    """A set of images: the moments of tokens at every level, the variance within some classes, and the mean token of
    each image and of its picture."""

    def __init__(self, num_levels: int, channels: int, classes: Collection[int] = ()) -> None:
        self.tokens = [Moments(channels) for _ in range(num_levels)]
        self.within = WithinClasses(classes)
        self.count = 0
        self._pooled: list[Tensor] = []
        self._pictures: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def add(self, canvases: Tensor, labels: Sequence[int]) -> None:
        """Add the canvases of n images, float [n, L, H, W, C]."""
        self.within.add(canvases, labels)
        tokens_NLTC = canvases.flatten(2, 3)
        drawn = torch.rand(len(canvases), tokens_NLTC.shape[2], generator=self._generator).argsort(dim=1)
        rows = torch.arange(len(canvases))[:, None]
        for level, moments in enumerate(self.tokens):
            moments.add(tokens_NLTC[rows, level, drawn[:, :TOKENS_PER_IMAGE]].flatten(0, 1))
        self._pooled.append(canvases[:, -1].mean(dim=(1, 2)))
        self.count += len(canvases)

    def add_pictures(self, vectors: Tensor) -> None:
        """Add what `seen_by` returns for the pictures of n images, float [n, C]."""
        self._pictures.append(vectors)

    @property
    def pooled(self) -> Tensor:
        """The mean token of each image's last canvas, float [N, C]."""
        return torch.cat(self._pooled)

    @property
    def pictures(self) -> Tensor:
        """The mean token of each picture, float [N, C]."""
        return torch.cat(self._pictures)


def seen_by(encoder: Encoder, pictures: np.ndarray) -> Tensor:
    """The mean token of pictures, float [n, C]: uint8 [n, h, w, 3], resized to the encoder's size (bicubic)."""
    side = (encoder.image_size_px, encoder.image_size_px)
    resized = [np.asarray(Image.fromarray(one).resize(side, Image.Resampling.BICUBIC)) for one in pictures]
    return torch.from_numpy(encoded_by(encoder, np.stack(resized))).mean(dim=(1, 2))


class Pictures:
    """Decoded samples in the feature space of Inception; only moments of features and logits are kept."""

    def __init__(self, inception: Inception) -> None:
        self._inception = inception
        self._moments: Moments | None = None
        self._logits: list[Tensor] = []

    def add(self, pictures: np.ndarray) -> None:
        """Add uint8 [n, h, w, 3]."""
        features, logits = self._inception(pictures)
        self._moments = self._moments or Moments(features.shape[1])
        self._moments.add(features)
        self._logits.append(logits)

    def metrics(self, reference: Gaussian | None) -> Iterator[tuple[str, float]]:
        """(name, value): fid if a reference is given, and inception_score with its deviation over 10 splits."""
        if self._moments is None:
            return
        if reference is not None:
            yield "fid", frechet_distance(self._moments.gaussian(), reference)
        logits = torch.cat(self._logits)
        score, deviation = inception_score(logits, min(SPLITS, len(logits)))
        yield "inception_score", score
        yield "inception_score_std", deviation


def distances(samples: Crowd, real: Crowd, halves: tuple[Crowd, Crowd]) -> Iterator[tuple[str, float]]:
    """(name, value): variety_<ℓ>, precision, recall, coverage, frechet_pooled and frechet_tokens_<ℓ>; with `_real`
    between halves of the real images.

    Values with `_real` are what a perfect model would get. Precision, recall and coverage depend on the number of
    images, so both they and their `_real` are of as many samples as real images: of the smallest set, see `_drawn`.
    Fréchet distances are of all images and shrink as their number grows, so only distances of equally many images are
    comparable; the numbers are yielded too.
    """
    count = min(samples.count, *(half.count for half in halves))
    unit = torch.from_numpy(real.tokens[-1].gaussian().covariance.diagonal().copy())
    for suffix, a, b in (("", samples, real), ("_real", *halves)):
        for level, ratio in enumerate(variety(a.within, b.within, unit)):
            if not math.isnan(ratio):
                yield f"variety_{level}{suffix}", ratio
        yield from _manifolds(suffix, a.pooled, b.pooled, count)
    for suffix, a, b in (("", samples, real), ("_real", *halves)):
        yield f"frechet_pooled{suffix}", _frechet(a.pooled, b.pooled)
        for level, (ours, theirs) in enumerate(zip(a.tokens, b.tokens, strict=True)):
            yield f"frechet_tokens_{level}{suffix}", frechet_distance(ours.gaussian(), theirs.gaussian())
    yield "num_samples", float(samples.count)
    yield "num_real", float(real.count)


def picture_distances(
    samples: Crowd, real: Crowd, halves: tuple[Crowd, Crowd]
) -> Iterator[tuple[str, float]]:
    """(name, value): frechet_pictures, and precision_pictures, recall_pictures, coverage_pictures; with `_real` as for
    `distances`."""
    count = min(len(each.pictures) for each in (samples, *halves))
    for suffix, a, b in (("", samples, real), ("_real", *halves)):
        yield f"frechet_pictures{suffix}", _frechet(a.pictures, b.pictures)
        yield from _manifolds(f"_pictures{suffix}", a.pictures, b.pictures, count)


def _frechet(*sets: Tensor) -> float:
    moments = [Moments(rows.shape[1]) for rows in sets]
    for each, rows in zip(moments, sets, strict=True):
        each.add(rows)
    return frechet_distance(*(each.gaussian() for each in moments))


def _manifolds(suffix: str, a: Tensor, b: Tensor, count: int) -> Iterator[tuple[str, float]]:
    a, b = _drawn(a, count), _drawn(b, count)
    if count > NEIGHBOURS:
        precision, recall = precision_recall(b, a, NEIGHBOURS)
        yield f"precision{suffix}", precision
        yield f"recall{suffix}", recall
    if count > COVERAGE_NEIGHBOURS:
        yield f"coverage{suffix}", coverage(b, a, COVERAGE_NEIGHBOURS)


def _drawn(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows, drawn at random with a fixed seed: rows in equal steps could all be of a few classes."""
    if len(rows) == count:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]
