"""Samples against real images, as they are drawn: Fréchet distances of canvases, precision, recall, FID and IS.

    L levels (coarse → fine), H×W grid, C channels, h×w pixels

Canvases are measured in the space of the model's own encoder, pictures in that of any other; both offline but for
FID and IS. A set of images is summed up by moments and one vector for each image, no canvases or pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.metrics.frechet import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
)
from trainer.trajectories.photos import Encoder

Inception = Callable[[np.ndarray], tuple[Tensor, Tensor]]
"""uint8 [B, h, w, 3] → (features [B, F], logits [B, K])."""
NEIGHBOURS = 3
SPLITS = 10
TOKENS_PER_IMAGE = 32
"""Tokens of an image that count for the moments of tokens, drawn anew for each: neighbours are alike, and all of them
would cost eight times as much."""


class Points:
    """Images by one vector each."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take float [n, C]."""
        self._parts.append(rows)

    @property
    def rows(self) -> Tensor:
        """All of them, float [N, C]."""
        return torch.cat(self._parts)

    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        moments = Moments(self.rows.shape[1])
        moments.add(self.rows)
        return moments.gaussian()


class Crowd:
    """Images by their canvases: token moments of every level, and pooled tokens."""

    def __init__(self, num_levels: int, channels: int) -> None:
        self.tokens = [Moments(channels) for _ in range(num_levels)]
        self.pooled = Points()
        self.count = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, canvases: Tensor) -> None:
        """Take float [n, L, H, W, C]."""
        tokens_NLTC = canvases.flatten(2, 3)
        drawn = torch.rand(len(canvases), tokens_NLTC.shape[2], generator=self._generator).argsort(dim=1)
        rows = torch.arange(len(canvases))[:, None]
        for level, moments in enumerate(self.tokens):
            moments.add(tokens_NLTC[rows, level, drawn[:, :TOKENS_PER_IMAGE]].flatten(0, 1))
        self.pooled.add(canvases[:, -1].mean(dim=(1, 2)))
        self.count += len(canvases)


def seen_by(encoder: Encoder, pictures: np.ndarray) -> Tensor:
    """The mean token of pictures, float [n, C]: uint8 [n, h, w, 3], resized to the encoder's size (bicubic)."""
    side = (encoder.image_size_px, encoder.image_size_px)
    resized = [np.asarray(Image.fromarray(one).resize(side, Image.Resampling.BICUBIC)) for one in pictures]
    return torch.from_numpy(encoder.encode(np.stack(resized))).float().mean(dim=(1, 2))


class Pictures:
    """Decoded samples as Inception sees them. Only features of moments and logits are kept."""

    def __init__(self, inception: Inception) -> None:
        self._inception = inception
        self._moments: Moments | None = None
        self._logits: list[Tensor] = []

    def add(self, pictures: np.ndarray) -> None:
        """Take uint8 [n, h, w, 3]."""
        features, logits = self._inception(pictures)
        self._moments = self._moments or Moments(features.shape[1])
        self._moments.add(features)
        self._logits.append(logits)

    def metrics(self, reference: Gaussian | None) -> Iterator[tuple[str, float]]:
        """fid with reference statistics; inception_score with its deviation over 10 splits."""
        if self._moments is None:
            return
        if reference is not None:
            yield "fid", frechet_distance(self._moments.gaussian(), reference)
        logits = torch.cat(self._logits)
        score, deviation = inception_score(logits, min(SPLITS, len(logits)))
        yield "inception_score", score
        yield "inception_score_std", deviation


def distances(samples: Crowd, real: Crowd, halves: tuple[Crowd, Crowd]) -> Iterator[tuple[str, float]]:
    """(name, value): frechet_pooled, frechet_tokens_<ℓ>, precision and recall; `_real` between halves of the real.

    The latter say what a perfect model would get with half as many images. Fréchet distances fall with the number of
    images, so they compare only at the same N; it is yielded too.
    """
    for suffix, a, b in (("", samples, real), ("_real", *halves)):
        yield f"frechet_pooled{suffix}", frechet_distance(a.pooled.gaussian(), b.pooled.gaussian())
        for level, (ours, theirs) in enumerate(zip(a.tokens, b.tokens, strict=True)):
            yield f"frechet_tokens_{level}{suffix}", frechet_distance(ours.gaussian(), theirs.gaussian())
        yield from _manifolds(suffix, a.pooled, b.pooled)
    yield "num_samples", float(samples.count)
    yield "num_real", float(real.count)


def picture_distances(
    samples: Points, real: Points, halves: tuple[Points, Points]
) -> Iterator[tuple[str, float]]:
    """(name, value): frechet_pictures, precision_pictures, recall_pictures; `_real` as for `distances`."""
    for suffix, a, b in (("", samples, real), ("_real", *halves)):
        yield f"frechet_pictures{suffix}", frechet_distance(a.gaussian(), b.gaussian())
        yield from _manifolds(f"_pictures{suffix}", a, b)


def _manifolds(suffix: str, a: Points, b: Points) -> Iterator[tuple[str, float]]:
    if min(len(a.rows), len(b.rows)) > NEIGHBOURS:
        precision, recall = precision_recall(b.rows, a.rows, NEIGHBOURS)
        yield f"precision{suffix}", precision
        yield f"recall{suffix}", recall
