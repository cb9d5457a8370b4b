"""FDr: distances of decoded samples from real images for several judges, as ratios to those of validation images.

A network that describes pictures has its own scale and its own blind spots. The ratio makes judges comparable, and
those a model was not post-trained with are the evidence: a distance that was minimised is none.

Source: "Representation Fréchet Loss for Visual Generation", arXiv 2604.28190 (FDr⁶ is the mean of six ratios).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Unpack

import torch

from hierarchy_builder.errors import TrainerError
from hierarchy_builder.progress import Follow, unseen
from hierarchy_builder.records import spread_evenly
from trainer.data.shards import ShardIndex
from trainer.metrics.frechet import Moments, frechet_distance
from trainer.post_training.judges import Judge, statistics_of_shards
from trainer.trajectories.pipeline import SAMPLED_TOGETHER, SamplingArguments, TrajectoryPipeline
from trainer.trajectories.trajectory import decode_finest


class Ratio(NamedTuple):
    """What one judge says."""

    judge: str
    frechet: float
    """Distance of samples from the reference."""
    of_validation: float
    """Distance of validation images from the reference."""
    ratio: float
    trained_on: bool
    """Whether the model was post-trained with this judge, so that the figure is no evidence."""
    num_samples: int
    num_seeds: int


def ratios(
    pipe: TrajectoryPipeline,
    index: ShardIndex,
    judges: Sequence[Judge],
    classes: Sequence[int],
    *,
    samples_per_class: int,
    max_real: int,
    trained_on: Sequence[str] = (),
    follow: Follow = unseen,
    **how: Unpack[SamplingArguments],
) -> Iterator[Ratio]:
    """One row for each judge, of samples whose seeds all differ, from 0. how: as for the pipeline.

    A judge with a reference is compared with that, and divided by the published distance of validation images or, for
    a judge without one, by that of the pictures in the shards. A judge without a reference is compared with every
    other picture in the shards, and divided by the distance of the rest: with few pictures that rest is far, too.
    Raises TrainerError where the model has no decoder, or shards are needed that hold no pictures.
    """
    labels = list(classes) * samples_per_class
    device = next(pipe.model.parameters()).device
    moments: dict[str, Moments] = {}
    size_px = (0, 0)
    drawn = follow(pipe.stream(labels, range(len(labels)), **how), "sampling", len(labels))
    while part := list(itertools.islice(drawn, SAMPLED_TOGETHER)):
        if not part[0].can_decode:
            raise TrainerError("judges look at pictures, and the run has no decoder: give --decoder FOLDER")
        shown = torch.from_numpy(decode_finest(part))
        pictures = shown.to(device).permute(0, 3, 1, 2).float() / 255
        size_px = (pictures.shape[2], pictures.shape[3])
        for judge in judges:
            with torch.no_grad():
                rows = judge.describe(pictures)
            moments.setdefault(judge.name, Moments(rows.shape[1])).add(rows)
    chosen = spread_evenly(index.num_samples, max_real)
    for judge in judges:
        reference, of_validation, rest = judge.reference, judge.of_validation, chosen
        real = partial(statistics_of_shards, judge, index, size_px, device=device)
        if reference is None:
            reference, rest, of_validation = real(chosen[::2]), chosen[1::2], None
        if of_validation is None:
            of_validation = frechet_distance(real(rest), reference)
        found = frechet_distance(moments[judge.name].gaussian(), reference)
        yield Ratio(
            judge=judge.name,
            frechet=found,
            of_validation=of_validation,
            ratio=found / of_validation,
            trained_on=judge.name in trained_on,
            num_samples=len(labels),
            num_seeds=len(labels),
        )
