"""Numbers for a trained model: samples of every class, measured beside real images and beside noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.progress import Follow, unseen
from trainer.data.pictures import picture_of
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex, spread_evenly
from trainer.evaluation.distribution import (
    Crowd,
    Inception,
    Pictures,
    Points,
    distances,
    picture_distances,
    seen_by,
)
from trainer.metrics.class_mean import class_mean_accuracy, describe
from trainer.metrics.flatness import explained_share, two_region_variance
from trainer.metrics.frechet import Gaussian
from trainer.metrics.region_consistency import consistency
from trainer.trajectories.photos import Encoder
from trainer.trajectories.pipeline import SAMPLED_TOGETHER, GuidanceLike, TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

FLATNESS_IMAGES = 256
"""Real images whose canvases are measured for reference."""
CONSISTENCY_IMAGES = 32
"""Samples, and real images, whose levels are held against each other; they are decoded too."""
READ_TOGETHER = 64
FEWEST = 4
"""Real images: half of them still have a covariance."""


def evaluate(
    pipe: TrajectoryPipeline,
    index: ShardIndex,
    *,
    samples_per_class: int = 8,
    num_steps: int = 1,
    max_real: int = 10_000,
    guidance: GuidanceLike = None,
    weak_scale: float = 0.0,
    inception: Inception | None = None,
    reference: Gaussian | None = None,
    space: Encoder | None = None,
    follow: Follow = unseen,
) -> Iterator[tuple[str, float]]:
    """(name, value) of each metric: see docs/metrics.md.

    flatness is the share of a level-0 canvas that two regions explain, roughness the rest as a distance in units of
    the spread of real tokens; both also of real canvases, of their raw tokens, and of noise.
    Samples seeds 0 … samples_per_class − 1 of every class; real images, at most `max_real`, are spread evenly
    over the shards. num_steps, guidance, weak_scale: as for the pipeline. inception, reference: for IS and FID, see
    `metrics.frechet`. space: encoder whose mean token describes decoded samples and the pictures that the shards
    hold, brought to the size of the samples first. follow: shows how far it is.
    Raises MismatchError if the shards do not fit the model, TrainerError if they hold no pictures where `space` asks
    for them, or the model has no decoder.
    """
    check_fits(pipe, index)
    if index.num_samples < FEWEST:
        raise TrainerError(
            f"{index.url} holds {index.num_samples} images, expected {FEWEST} or more: real images are halved, and "
            "each half needs a spread"
        )
    if space is not None:  # shards without pictures are refused before samples are drawn
        reader = ShardReader(index)
        picture_of(reader.read(0, extras=True), index.grid)
        reader.close()
    labels = list(range(index.num_classes)) * samples_per_class
    seeds = [seed for seed in range(samples_per_class) for _ in range(index.num_classes)]
    sampled = _Sampled(pipe, inception, space)
    drawn = pipe.stream(labels, seeds, num_steps, guidance, weak_scale)
    sampled.draw(follow(drawn, "sampling", len(labels)))
    real = _Real(pipe, index, max_real, space, sampled.size_px, follow)
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
    if space is not None:
        yield from picture_distances(sampled.seen, real.seen, real.seen_halves)
    if sampled.pictures is not None:
        yield from sampled.pictures.metrics(reference)


def check_fits(pipe: TrajectoryPipeline, index: ShardIndex) -> None:
    """Raise MismatchError unless encoder, grid, width, levels and classes of the shards are those of the model."""
    for name in ("name", "weights_hash"):
        trained, given = pipe.encoder.get(name), index.encoder.get(name)
        if None not in (trained, given) and trained != given:
            raise MismatchError(
                f"{index.url} holds features of encoder {name} {given!r}, the model was trained on {trained!r}: "
                "give shards of the same encoder"
            )
    config = pipe.model.config
    # A network of tokens and pixels alone has one level, and fits any hierarchy of them.
    levels = config.num_levels if config.num_levels > 1 else index.num_levels
    found = (index.grid, index.width, index.num_levels, index.num_classes)
    wanted = (config.grid, config.in_channels, levels, config.num_classes)
    if found != wanted:
        raise MismatchError(
            f"{index.url} holds (grid, width, levels, classes) {found}, the model was trained on {wanted}: "
            "give shards of the same encoder, recipe and classes"
        )


def _crowd(pipe: TrajectoryPipeline) -> Crowd:
    return Crowd(pipe.drawn_levels, pipe.model.config.in_channels)


class _Sampled:
    """What is kept of samples while they are drawn; few trajectories are in memory at a time."""

    def __init__(self, pipe: TrajectoryPipeline, inception: Inception | None, space: Encoder | None) -> None:
        self.descriptions: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.crowd = _crowd(pipe)
        self.shown: list[tuple[Tensor, Tensor | None, np.ndarray | None]] = []
        self.pictures = None if inception is None else Pictures(inception)
        self.space, self.seen = space, Points()
        self.size_px = (0, 0)
        """(h, w) of decoded samples, where they are decoded."""

    def draw(self, trajectories: Iterator[Trajectory]) -> None:
        """Take all of them."""
        while part := list(itertools.islice(trajectories, SAMPLED_TOGETHER)):
            levels = torch.stack([trajectory.levels for trajectory in part])
            self.descriptions.append(describe(levels[:, -1]))
            self.variances.append(torch.stack(two_region_variance(levels[:, 0])))
            self.crowd.add(levels)
            if levels.shape[1] > 1:
                self.shown += [_shown(each) for each in part[: CONSISTENCY_IMAGES - len(self.shown)]]
            if self.pictures is not None or self.space is not None:
                last = levels.shape[1] - 1
                self._see(np.stack([each.decode(level=last) for each in part]))

    def _see(self, pictures: np.ndarray) -> None:
        self.size_px = pictures.shape[1:3]
        if self.pictures is not None:
            self.pictures.add(pictures)
        if self.space is not None:
            self.seen.add(seen_by(self.space, pictures))


class _Real:
    """The same of real images, which are read spread evenly over the shards."""

    def __init__(
        self,
        pipe: TrajectoryPipeline,
        index: ShardIndex,
        most: int,
        space: Encoder | None,
        size_px: tuple[int, int],
        follow: Follow,
    ) -> None:
        self.descriptions: list[Tensor] = []
        self.labels: list[int] = []
        self.canvases: list[Tensor] = []
        """Of the first few, [n, L, H, W, C]."""
        self.crowd, self.halves = _crowd(pipe), (_crowd(pipe), _crowd(pipe))
        self.seen, self.seen_halves = Points(), (Points(), Points())
        self.shown: list[tuple[Tensor, Tensor | None, np.ndarray | None]] = []
        normaliser = pipe.normaliser.to("cpu")
        chosen = spread_evenly(index.num_samples, most)
        reader = ShardReader(index)
        waiting = follow(chosen, "real images", len(chosen))
        while numbers := list(itertools.islice(waiting, READ_TOGETHER)):
            samples = [reader.read(number, extras=space is not None) for number in numbers]
            features = torch.from_numpy(np.stack([sample.features for sample in samples])).float()
            regions = torch.from_numpy(np.stack([sample.regions for sample in samples]))
            canvases = normaliser.teacher_canvases(features, regions)
            self.descriptions.append(describe(features))
            self.labels += [sample.label for sample in samples]
            if len(self.labels) <= FLATNESS_IMAGES:
                self.canvases.append(canvases)
            if pipe.drawn_levels > 1:
                for sample in samples[: CONSISTENCY_IMAGES - len(self.shown)]:
                    self.shown.append(
                        _shown(pipe.from_features(sample.features, sample.regions, label=sample.label))
                    )
            drawn = canvases[:, -pipe.drawn_levels :]
            self.crowd.add(drawn)
            for half, part in zip(self.halves, (drawn[::2], drawn[1::2]), strict=True):
                half.add(part)
            if space is not None:
                seen = seen_by(space, np.stack([picture_of(sample, size_px) for sample in samples]))
                self.seen.add(seen)
                for points, part in zip(self.seen_halves, (seen[::2], seen[1::2]), strict=True):
                    points.add(part)
        reader.close()


def _shown(trajectory: Trajectory) -> tuple[Tensor, Tensor | None, np.ndarray | None]:
    """What `consistency` takes; regions of samples and of real images are found in the same way."""
    return trajectory.levels, None, trajectory.decode() if trajectory.can_decode else None
