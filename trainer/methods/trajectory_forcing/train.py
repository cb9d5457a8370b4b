"""Training: batches in, checkpoints and metrics.jsonl out; stops at any step and goes on bit for bit.

A step's batch, levels, times and noise are functions of (seed, step) for the whole global batch, and each rank
takes its rows. Every part of the loss is scaled to the global batch before `backward`, so that gradients are
summed, not averaged, over micro-batches and ranks and any split of the batch takes the same steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hierarchy_builder.errors import MismatchError
from trainer.data.normalisation import normaliser_of
from trainer.data.shards import ShardIndex, open_index
from trainer.data.stream import Batch, BatchDataset, coverage
from trainer.decode.rae import find_decoder
from trainer.methods.trajectory_forcing import objective as trajectory_forcing
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.training import checkpoint as saved
from trainer.training.compiled import compiled
from trainer.training.config import TrainConfig
from trainer.training.distributed import World, joined_world
from trainer.training.loop import Loop, RunSummary
from trainer.training.optim import MuonAdam
from trainer.training.run_folder import check_same_run, find_origin
from trainer.training.schedules import learning_rate
from trainer.training.stopping import StopRequest, stop_signals
from trainer.training.weights import WeightAverages
from trainer.trajectories.preview import preview_sheet

TERMS = ("loss", "region", "loss_u", "loss_v", "raw_mse_u", "raw_mse_v")
"""What a step reports: the loss and its parts, each a mean over the global batch."""


def train(
    config: TrainConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False
) -> RunSummary:
    """Train on the shards at `shards` until `total_images`, in the run folder `out`.

    resume: `auto` goes on from the newest checkpoint of `out` if there is one, `never` asks for a fresh folder,
    else a run or checkpoint folder to start from. Grid, channels, classes and levels come from the shards.
    Raises MismatchError when `out` was made with another configuration or other shards, InterruptedRunError
    after a checkpoint on SIGTERM, SIGUSR1 or `max_seconds`, KeyboardInterrupt after one on Ctrl-C, and
    NonFiniteLossError when the loss or a gradient is not finite.
    """
    index = open_index(shards)
    config = fit_to_shards(config, index)
    with joined_world() as world, stop_signals() as stop:
        return _Run(config, index, Path(out), resume, world, stop, quiet).train()


def fit_to_shards(config: TrainConfig, index: ShardIndex, asked: Collection[str] = ()) -> TrainConfig:
    """The config with the model's grid, channels, classes and levels as the shards have them.

    asked: dotted names of the fields that were set on purpose. Raises MismatchError naming both values where one
    of these four is not that of the shards.
    """
    found: dict[str, Any] = {
        "grid": index.grid,
        "in_channels": index.width,
        "num_classes": index.num_classes,
        "num_levels": index.num_levels,
    }
    for name, value in found.items():
        wanted = getattr(config.model, name)
        if f"model.{name}" in asked and wanted != value:
            raise MismatchError(
                f"model.{name} is {wanted}, {index.url} holds {value}: leave it out, it comes from the shards"
            )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))


class _Run(Loop):
    """One run of Trajectory Forcing in one process."""

    terms = TERMS
    model: TrajectoryTransformer

    def __init__(
        self,
        config: TrainConfig,
        index: ShardIndex,
        out: Path,
        resume: str,
        world: World,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        super().__init__(config, index, out, world, stop, quiet)
        self.plan = self._stream_plan(level_per=config.level_per)
        self.dataset = BatchDataset(
            index, self.plan, world.rank, world.size, config.verify_shards, config.max_damaged_shards
        )
        origin = find_origin(out, resume, world.is_main)
        check_same_run(out, origin, config, index)
        normaliser = saved.load_normaliser(origin) if origin else normaliser_of(config.normalise, index)
        self.normaliser = normaliser.to(world.device)
        self.model = _fresh_model(config).to(world.device)
        self.model.recompute = config.activation_checkpointing
        self.objective = compiled(trajectory_forcing.loss) if config.compile else trajectory_forcing.loss
        self.optimizer = MuonAdam(self.model.named_parameters(), config.optim)
        self.averages = WeightAverages(self.model, config.optim.ema_halflives_kimg, config.optim.ema_ramp)
        self.counts: np.ndarray | None = None
        self.counted = 0
        self._begin(origin)

    def _rate(self) -> float:
        config, optim = self.config, self.config.optim
        return learning_rate(self.images_seen, config.total_images, optim.lr, optim.cooldown_fraction)

    def _backward(self, batch: Batch, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; returns their part of each of TERMS."""
        config, device = self.config, self.world.device
        first = self.world.rank * len(batch)
        part = batch.rows(start, stop).to(device)
        x, prev, regions = part.targets(self.normaliser)
        draws = trajectory_forcing.draw_batch(
            config.batch_size,
            x.shape[1:],
            config.method,
            seed=config.seed,
            step=self.step,
            rows=slice(first + start, first + stop),
            device=device,
        )
        label = part.label
        if config.model.guidance:
            label = torch.where(draws.drop_label, config.model.num_classes, label)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            terms = self.objective(
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
            )
        # The region term is a mean over the samples that have regions, the others over all samples.
        share = len(part) / config.batch_size
        region = terms["region"] * (
            (part.level < config.model.num_levels - 1).sum() / self._num_with_regions()
        )
        loss = (terms["loss_u"] + terms["loss_v"]) * share + config.method.region_weight * region
        loss.backward()
        means = (terms[name] * share for name in ("loss_u", "loss_v", "raw_mse_u", "raw_mse_v"))
        return torch.stack([loss, region, *means]).detach().double()

    def _num_with_regions(self) -> int:
        """Samples of the current global batch whose level has regions (the last has none), at least 1."""
        _, levels = self.plan.places(self.images_seen, self.images_seen + self.config.batch_size)
        return max(1, int((levels < self.config.model.num_levels - 1).sum()))

    def _audit(self) -> dict[str, Any]:
        return {"coverage": self._coverage(), **super()._audit()}

    def _sheet(self) -> Image.Image:
        """Samples of the model as it is, with its first weight average where there is one."""
        decoder = find_decoder(self.out, self.index.encoder)
        with self._averaged():
            names, encoder = self.index.class_names, self.index.encoder
            return preview_sheet(self.model, names, encoder, self.normaliser, decoder)

    def _coverage(self) -> dict[str, list[int]]:
        """Audit of all finished epochs: images per level, and samples by the number of levels they met."""
        boundary = self.images_seen // self.plan.num_samples * self.plan.num_samples
        if self.counts is None:
            self.counts, self.counted = self.plan.level_counts(0, boundary), boundary
        self.counts += self.plan.level_counts(self.counted, boundary)
        self.counted = boundary
        return coverage(self.counts)


def _fresh_model(config: TrainConfig) -> TrajectoryTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TrajectoryTransformer(config.model)
