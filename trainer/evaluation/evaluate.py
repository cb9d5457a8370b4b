"""Metrics of a trained model: samples of every class, compared with real images and with noise."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import TrainerError
from hierarchy_builder.progress import Follow, unseen
from hierarchy_builder.records import Sample, spread_evenly
from trainer.data.pictures import picture_of
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex, check_trained_on
from trainer.evaluation.distribution import Crowd, Inception, Pictures, distances, picture_distances, seen_by
from trainer.metrics.class_mean import class_mean_accuracy, describe
from trainer.metrics.flatness import explained_share, two_region_variance
from trainer.metrics.frechet import Gaussian
from trainer.metrics.region_consistency import consistency
from trainer.metrics.variety import FEWEST_IMAGES, measured_classes
from trainer.trajectories.photos import Encoder
from trainer.trajectories.pipeline import SAMPLED_TOGETHER, SamplingArguments, TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory, decode_finest

FLATNESS_IMAGES = 256
"""Real images whose canvases give the reference values of flatness and roughness."""
CONSISTENCY_IMAGES = 32
"""Samples, and real images, of which consistency between levels is measured; they are decoded too."""
READ_TOGETHER = 64
FEWEST = 4
"""Smallest number of real images: a covariance of each half needs two."""


def evaluate(
    pipe: TrajectoryPipeline,
    index: ShardIndex,
    *,
    samples_per_class: int = 8,
    max_real: int = 10_000,
    inception: Inception | None = None,
    reference: Gaussian | None = None,
    space: Encoder | None = None,
    follow: Follow = unseen,
    **how: Unpack[SamplingArguments],
) -> Iterator[tuple[str, float]]:
    """(name, value) of each metric: see docs/metrics.md.

    flatness is the share of a level-0 canvas that two regions explain; roughness is the rest, as a distance in units
    of the spread of real tokens. Both are also measured on real canvases, their raw tokens, and noise.
    Reads at most `max_real` real images, spread evenly over the shards, and draws samples of every class that one of
    them has; the class map may hold more classes, with which no sample could be compared. Each sample has a seed of
    its own, from 0: classes that share seeds differ from their means in the same few directions, and recall is near 0.
    how: as for the pipeline. inception, reference: for inception score and FID, see
    `metrics.frechet`. space: encoder whose mean token describes decoded samples, and the pictures in the shards after
    they are resized to the size of the samples. follow: shows progress.
    Raises MismatchError if the shards do not fit the model, TrainerError if `space` is given but the shards hold no
    pictures or the model has no decoder.
    """
    check_fits(pipe, index)
    if index.num_samples < FEWEST:
        raise TrainerError(
            f"{index.url} holds {index.num_samples} images, expected {FEWEST} or more: real images are halved, and "
            "each half needs a spread"
        )
    reader, chosen = ShardReader(index), spread_evenly(index.num_samples, max_real)
    if space is not None:  # shards without pictures are refused before samples are drawn
        picture_of(reader.read(0, extras=True), index.grid)
    counts = Counter(reader.label(number) for number in chosen)
    classes = sorted(counts)
    labels = classes * samples_per_class
    varied = measured_classes(
        (label for label, count in counts.items() if count >= FEWEST_IMAGES),
        pipe.drawn_levels * math.prod(index.grid) * index.width,
    )
    sampled = _Sampled(inception, pipe, varied, space)
    drawn = pipe.stream(labels, range(len(labels)), **how)
    sampled.draw(follow(drawn, "sampling", len(labels)))
    real = _Real(sampled.size_px, pipe, varied, space)
    real.read(reader, chosen, follow)
    reader.close()
    yield from class_mean_accuracy(
        (torch.cat(sampled.descriptions), torch.tensor(labels)),
        (torch.cat(real.descriptions), torch.tensor(real.labels)),
        index.num_classes,
    )
    canvases = torch.cat(real.canvases)[:FLATNESS_IMAGES]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(canvases), *canvases.shape[2:], generator=generator)
    references = {"_real": canvases[:, 0], "_real_tokens": canvases[:, -1], "_noise": noise}
    measured = {"": torch.cat(sampled.variances, dim=1).unbind()}
    measured |= {suffix: two_region_variance(canvas) for suffix, canvas in references.items()}
    _, spread = measured["_real_tokens"]
    for suffix, (within, total) in measured.items():
        yield f"flatness{suffix}", float(explained_share(within, total).mean())
        yield f"roughness{suffix}", float((within.mean() / spread.mean()).sqrt())
    if sampled.shown:
        yield from consistency(sampled.shown)
        yield from consistency(real.shown, "_real")
    yield from distances(sampled.crowd, real.crowd, real.halves)
    yield "num_classes", float(len(classes))
    if space is not None:
        yield from picture_distances(sampled.crowd, real.crowd, real.halves)
    if sampled.pictures is not None:
        yield from sampled.pictures.metrics(reference)


def check_fits(pipe: TrajectoryPipeline, index: ShardIndex) -> None:
    """Raise MismatchError unless encoder, grid, width, levels and classes of the shards are those of the model."""
    check_trained_on(index, pipe.model.config, pipe.encoder, "the model")


class _Kept:
    """What is kept of a set of images; few of their trajectories are in memory at a time."""

    def __init__(self, pipe: TrajectoryPipeline, varied: Collection[int], space: Encoder | None) -> None:
        """varied: the classes within which the variance is measured."""
        self.pipe, self.varied, self.space = pipe, varied, space
        self.crowd = self.new_crowd()
        self.descriptions: list[Tensor] = []
        self.shown: list[tuple[Tensor, np.ndarray | None]] = []
        """Levels and decoded pictures of the first few."""

    def new_crowd(self) -> Crowd:
        return Crowd(self.pipe.drawn_levels, self.pipe.model.config.in_channels, self.varied)

    def show(self, trajectories: Iterator[Trajectory]) -> None:
        """Keep the first few for `consistency`, which finds regions of samples and of real images in the same way."""
        if self.pipe.drawn_levels > 1:
            for each in itertools.islice(trajectories, CONSISTENCY_IMAGES - len(self.shown)):
                self.shown.append((each.levels, each.decode() if each.can_decode else None))


class _Sampled(_Kept):
    """Samples, which are measured while they are drawn."""

    def __init__(self, inception: Inception | None, *kept: Any) -> None:
        super().__init__(*kept)
        self.variances: list[Tensor] = []
        self.pictures = None if inception is None else Pictures(inception)
        self.size_px = (0, 0)
        """(h, w) of decoded samples, if they are decoded."""

    def draw(self, trajectories: Iterator[Trajectory]) -> None:
        """Measure all of them."""
        while part := list(itertools.islice(trajectories, SAMPLED_TOGETHER)):
            levels = torch.stack([trajectory.levels for trajectory in part])
            self.descriptions.append(describe(levels[:, -1]))
            self.variances.append(torch.stack(two_region_variance(levels[:, 0])))
            self.crowd.add(levels, [trajectory.label for trajectory in part])
            self.show(iter(part))
            if self.pictures is not None or self.space is not None:
                pictures = decode_finest(part)
                self.size_px = pictures.shape[1:3]
                if self.pictures is not None:
                    self.pictures.add(pictures)
                if self.space is not None:
                    self.crowd.add_pictures(seen_by(self.space, pictures))


class _Real(_Kept):
    """Real images, spread evenly over the shards, and two halves of them."""

    def __init__(self, size_px: tuple[int, int], *kept: Any) -> None:
        """size_px: (h, w) of decoded samples, to which pictures are resized where `space` describes them."""
        super().__init__(*kept)
        self.halves = (self.new_crowd(), self.new_crowd())
        self.labels: list[int] = []
        self.canvases: list[Tensor] = []
        """Canvases of the first images, [n, L, H, W, C]."""
        self._normaliser, self._size_px = self.pipe.normaliser.to("cpu"), size_px

    def read(self, reader: ShardReader, chosen: Sequence[int], follow: Follow) -> None:
        """Measure the samples of these numbers."""
        waiting = follow(chosen, "real images", len(chosen))
        while numbers := list(itertools.islice(waiting, READ_TOGETHER)):
            self._add([reader.read(number, extras=self.space is not None) for number in numbers])

    def _add(self, samples: list[Sample]) -> None:
        features = torch.from_numpy(np.stack([sample.features for sample in samples])).float()
        regions = torch.from_numpy(np.stack([sample.regions for sample in samples]))
        canvases = self._normaliser.teacher_canvases(features, regions)
        self.descriptions.append(describe(features))
        labels = [sample.label for sample in samples]
        self.labels += labels
        if len(self.labels) <= FLATNESS_IMAGES:
            self.canvases.append(canvases)
        self.show(self.pipe.from_features(each.features, each.regions, label=each.label) for each in samples)
        drawn = canvases[:, -self.pipe.drawn_levels :]
        crowds = (self.crowd, *self.halves)
        parts = (slice(None), slice(None, None, 2), slice(1, None, 2))
        for crowd, part in zip(crowds, parts, strict=True):
            crowd.add(drawn[part], labels[part])
        if self.space is not None:
            seen = seen_by(self.space, np.stack([picture_of(sample, self._size_px) for sample in samples]))
            for crowd, part in zip(crowds, parts, strict=True):
                crowd.add_pictures(seen[part])
