"""Training of Trajectory Forcing; see `trainer.training.method_run` for the part that all methods share."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.reader import looked_at, spread_samples
from trainer.data.shards import ShardIndex
from trainer.data.stream import Batch, StreamPlan, coverage
from trainer.decode.rae import find_decoder
from trainer.methods.trajectory_forcing import objective as trajectory_forcing
from trainer.methods.trajectory_forcing.config import RELEASE_NUMBERS, RELEASE_SHIFT, TrainConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.pipeline import TrajectoryForcingPipeline
from trainer.methods.trajectory_forcing.visibility import visibility_lines
from trainer.seeds import StepRows
from trainer.training.method_run import MethodRun, with_model


def chosen_time_shift(grid: tuple[int, int], channels: int) -> float:
    """Choose the shift of the time distribution by the size of a canvas: the release's 10 at 16·16·768 numbers.

    The more numbers describe an image, the more noise it takes to hide it: averaging n numbers of equal content divides
    the noise by sqrt(n). So the shift scales with the root of the count, and is never below 1.
    Source: resolution-dependent shift of Esser et al. (2024), arXiv 2403.03206, with numbers in place of pixels as in
    RAE (Zheng et al. 2025), arXiv 2510.11690.
    """
    numbers = grid[0] * grid[1] * channels
    return max(1.0, RELEASE_SHIFT * math.sqrt(numbers / RELEASE_NUMBERS))


START_SAMPLES = 2_048
"""Samples, spread evenly over the shards, from which a Gaussian start takes its means and deviations."""


class TrajectoryForcingRun(MethodRun):
    """One run of Trajectory Forcing in one process."""

    terms = ("loss", "region", "loss_u", "loss_v", "raw_mse_u", "raw_mse_v")
    pipeline = TrajectoryForcingPipeline
    loss_function = staticmethod(trajectory_forcing.loss)
    model: TrajectoryTransformer
    counts: Any = 0
    """Images per sample and level during the first `counted` images of the run."""
    counted = 0

    @classmethod
    def fitted(cls, config: TrainConfig, index: ShardIndex, asked: Collection[str] = ()) -> TrainConfig:
        found: dict[str, Any] = {"num_levels": index.num_levels}
        if any(side % config.model.patch_size for side in index.grid):
            found["patch_size"] = 1  # a preset's squares of tokens do not cover this grid
        config = with_model(config, index, asked, **found)
        if config.method.time_shift is None:
            shift = chosen_time_shift(config.model.grid, config.model.in_channels)
            config = dataclasses.replace(config, method=dataclasses.replace(config.method, time_shift=shift))
        return config

    def _network(self) -> TrajectoryTransformer:
        network = super()._network()
        if network.start is not None and self.origin is None:  # a checkpoint holds what was fitted
            # Kept as they are stored, since canvases take eight times the memory.
            samples = list(self._samples(spread_samples(self.index, START_SAMPLES)))
            normaliser, share = self.normaliser.to("cpu"), self.config.model.start_share
            network.start.fit(lambda: ((rows.canvases(normaliser), rows.label) for rows in samples), share)
        return network

    def _begin(self, origin: Path | None) -> None:
        super()._begin(origin)
        if self.world.is_main and not self.quiet:
            rows = next(self._samples(looked_at(self.index)[0][1]))
            seen = rows.tokens(self.normaliser.to("cpu"))
            for line in visibility_lines(seen, rows.regions, self.config.method):
                print(line, file=sys.stderr)

    def _plan(self) -> StreamPlan:
        return self._stream_plan(level_per=self.config.level_per)

    def _terms(self, part: Batch, rows: StepRows) -> dict[str, Tensor]:
        config = self.config
        x, prev, regions = part.targets(self.normaliser)
        draws = trajectory_forcing.draw_batch(rows, x.shape[1:], config.method)
        label = part.label
        if config.model.guidance:
            label = torch.where(draws.drop_label, config.model.num_classes, label)
        with self._autocast():
            return self.objective(
                self.model,
                x,
                prev=draws.noisy(prev, part.level),
                level=part.level,
                label=label,
                regions=regions,
                t=draws.t,
                r=draws.r,
                noise=draws.noise,
                guidance=draws.guidance if config.model.guidance else None,
                region_weight=config.method.region_weight,
                region_timing=config.method.region_timing,
                direction=config.method.direction,
            )

    def _scaled(self, terms: Mapping[str, Tensor], part: Batch) -> dict[str, Tensor]:
        # The region term is a mean over the samples that have regions; the other terms are means over all samples.
        share = len(part) / self.config.batch_size
        with_regions = (part.level < self.config.model.num_levels - 1).sum()
        region = terms["region"] * (with_regions / self._num_with_regions())
        loss = (terms["loss_u"] + terms["loss_v"]) * share + self.config.method.region_weight * region
        means = {name: terms[name] * share for name in ("loss_u", "loss_v", "raw_mse_u", "raw_mse_v")}
        return {"loss": loss, "region": region, **means}

    def _num_with_regions(self) -> int:
        """Count the samples of the global batch whose level has regions (the last level has none), at least 1."""
        _, levels = self.plan.places(self.images_seen, self.images_seen + self.config.batch_size)
        return max(1, int((levels < self.config.model.num_levels - 1).sum()))

    def _audit(self) -> dict[str, Any]:
        """Also how many images of each level, and samples by how many of their levels, all finished epochs held."""
        boundary = self.images_seen // self.plan.num_samples * self.plan.num_samples
        self.counts = self.counts + self.plan.level_counts(self.counted, boundary)
        self.counted = boundary
        return {"coverage": coverage(self.counts), **super()._audit()}

    def _decoder(self) -> Any:
        decoder = find_decoder(self.out, self.index.encoder)
        return decoder and decoder.to(self.world.device)
