"""Numbers for a trained model: samples of every class, measured beside real images and beside noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.errors import MismatchError
from trainer.metrics.class_mean import class_mean_accuracy, describe
from trainer.metrics.flatness import explained_share, two_region_variance
from trainer.normalisation import Normaliser
from trainer.pipeline import SAMPLED_TOGETHER, GuidanceLike, TrajectoryPipeline
from trainer.reader import ShardReader
from trainer.shards import ShardIndex
from trainer.trajectory import Trajectory

FLATNESS_IMAGES = 256
"""Real images whose canvases are measured for reference."""
READ_TOGETHER = 64


def evaluate(
    pipe: TrajectoryPipeline,
    index: ShardIndex,
    samples_per_class: int = 8,
    num_steps: int = 1,
    max_real: int = 10_000,
    guidance: GuidanceLike = None,
    weak_scale: float = 0.0,
) -> Iterator[tuple[str, float]]:
    """(name, value) of each metric: see `metrics.class_mean` and `metrics.flatness`.

    flatness is the share of a level-0 canvas that two regions explain, roughness the rest as a distance in units of
    the spread of real tokens; both also of real canvases, of their raw tokens, and of noise.
    Samples seeds 0 … samples_per_class − 1 of every class; real images, at most `max_real`, are spread evenly
    over the shards. num_steps, guidance, weak_scale: as for the pipeline.
    Raises MismatchError if the shards do not fit the model.
    """
    check_fits(pipe, index)
    labels = list(range(index.num_classes)) * samples_per_class
    seeds = [seed for seed in range(samples_per_class) for _ in range(index.num_classes)]
    sampled, coarse = _sampled(pipe.stream(labels, seeds, num_steps, guidance, weak_scale))
    descriptions, real_labels, canvases = _real(index, max_real, pipe.normaliser.to("cpu"))
    yield from class_mean_accuracy(
        (sampled, torch.tensor(labels)), (descriptions, real_labels), index.num_classes
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(canvases), *canvases.shape[2:], generator=generator)
    references = {"_real": canvases[:, 0], "_real_tokens": canvases[:, -1], "_noise": noise}
    measured = {"": coarse} | {suffix: two_region_variance(canvas) for suffix, canvas in references.items()}
    _, spread = measured["_real_tokens"]
    for suffix, (within, total) in measured.items():
        yield f"flatness{suffix}", float(explained_share(within, total).mean())
        yield f"roughness{suffix}", float((within.mean() / spread.mean()).sqrt())


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
    found = (index.grid, index.width, index.num_levels, index.num_classes)
    wanted = (config.grid, config.in_channels, config.num_levels, config.num_classes)
    if found != wanted:
        raise MismatchError(
            f"{index.url} holds (grid, width, levels, classes) {found}, the model was trained on {wanted}: "
            "give shards of the same encoder, recipe and classes"
        )


def _sampled(trajectories: Iterator[Trajectory]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Descriptions [N, F] of samples and the variances of their level-0 canvases; few trajectories at a time."""
    descriptions, variances = [], []
    while part := list(itertools.islice(trajectories, SAMPLED_TOGETHER)):
        levels = torch.stack([trajectory.levels for trajectory in part])
        descriptions.append(describe(levels[:, -1]))
        variances.append(torch.stack(two_region_variance(levels[:, 0])))
    within, total = torch.cat(variances, dim=1)
    return torch.cat(descriptions), (within, total)


def _real(index: ShardIndex, max_real: int, normaliser: Normaliser) -> tuple[Tensor, Tensor, Tensor]:
    """Descriptions [N, F], labels [N] and, of the first few, canvases [M, L, H, W, C] of the shards."""
    chosen = np.linspace(0, index.num_samples - 1, min(max_real, index.num_samples)).astype(int)
    reader = ShardReader(index)
    descriptions, labels, canvases = [], [], []
    for start in range(0, len(chosen), READ_TOGETHER):
        samples = [reader.read(int(number)) for number in chosen[start : start + READ_TOGETHER]]
        features = torch.from_numpy(np.stack([sample.features for sample in samples])).float()
        regions = torch.from_numpy(np.stack([sample.regions for sample in samples]))
        descriptions.append(describe(features))
        labels += [sample.label for sample in samples]
        if start < FLATNESS_IMAGES:
            canvases.append(normaliser.teacher_canvases(features, regions))
    reader.close()
    return torch.cat(descriptions), torch.tensor(labels), torch.cat(canvases)[:FLATNESS_IMAGES]
