"""Numbers for a trained model: samples of every class, measured beside real images and beside noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.errors import MismatchError
from trainer.metrics.class_mean import class_mean_accuracy, describe
from trainer.metrics.flatness import explained_share, two_region_variance
from trainer.normalisation import Normaliser
from trainer.pipeline import SAMPLED_TOGETHER, TrajectoryPipeline
from trainer.reader import ShardReader
from trainer.shards import ShardIndex

FLATNESS_IMAGES = 256
"""Real images whose canvases are measured for reference."""
READ_TOGETHER = 64


def evaluate(
    pipe: TrajectoryPipeline,
    index: ShardIndex,
    samples_per_class: int = 8,
    num_steps: int = 1,
    max_real: int = 10_000,
) -> Iterator[tuple[str, float]]:
    """(name, value) of each metric: see `metrics.class_mean` and `metrics.flatness`.

    flatness is the share of a level-0 canvas that two regions explain, roughness the rest as a distance in units of
    the spread of real tokens; both also of real canvases, of their raw tokens, and of noise.
    Samples seeds 0 … samples_per_class − 1 of every class; real images, at most `max_real`, are spread evenly
    over the shards. Raises MismatchError if the shards do not fit the model.
    """
    check_fits(pipe, index)
    labels = list(range(index.num_classes)) * samples_per_class
    seeds = [seed for seed in range(samples_per_class) for _ in range(index.num_classes)]
    sampled, coarse = _sampled(pipe, labels, seeds, num_steps)
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
    """Raise MismatchError unless grid, width, levels and classes of the shards are those of the model."""
    config = pipe.model.config
    found = (index.grid, index.width, index.num_levels, index.num_classes)
    wanted = (config.grid, config.in_channels, config.num_levels, config.num_classes)
    if found != wanted:
        raise MismatchError(
            f"{index.url} holds (grid, width, levels, classes) {found}, the model was trained on {wanted}: "
            "give shards of the same encoder, recipe and classes"
        )


def _sampled(
    pipe: TrajectoryPipeline, labels: list[int], seeds: list[int], num_steps: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Descriptions [N, F] of samples and the variances of their level-0 canvases; few trajectories at a time."""
    descriptions, variances = [], []
    for start in range(0, len(labels), SAMPLED_TOGETHER):
        part = slice(start, start + SAMPLED_TOGETHER)
        levels = torch.stack([each.levels for each in pipe(labels[part], seeds[part], num_steps)])
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
