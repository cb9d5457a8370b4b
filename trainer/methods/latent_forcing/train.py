"""Training of Latent Forcing: shards with pictures in, checkpoints and metrics.jsonl out; the loop of every training.

A step's batch, clocks and noise are functions of (seed, step) for the whole global batch, and each rank takes its
rows. Latents are normalised by the exact statistics of the shards and scaled to about the spread of pixels, since a
scale is a shift in time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hierarchy_builder.errors import MismatchError
from trainer.data.normalisation import Normaliser, normaliser_of
from trainer.data.pictures import PictureBatch, PictureDataset
from trainer.data.shards import STATISTICS, ShardIndex, open_index
from trainer.methods.latent_forcing import objective as latent_forcing
from trainer.methods.latent_forcing.config import LatentMethodConfig, LatentTrainConfig
from trainer.methods.latent_forcing.network import PixelLatentTransformer
from trainer.methods.latent_forcing.pipeline import LatentPipeline, latents_of
from trainer.training import checkpoint as saved
from trainer.training.compiled import compiled
from trainer.training.distributed import World, joined_world
from trainer.training.loop import Loop, RunSummary
from trainer.training.optim import optimizer_of
from trainer.training.run_folder import check_same_run, find_origin
from trainer.training.schedules import learning_rate
from trainer.training.stopping import StopRequest, stop_signals
from trainer.training.weights import WeightAverages
from trainer.trajectories.preview import pipeline_sheet

CHECKED = 16
"""Samples, spread evenly, whose features the statistics have to describe."""
FOREIGN = 4.0
"""Statistics by which those are this much too large or too small are of something else."""


def train(
    config: LatentTrainConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False
) -> RunSummary:
    """Train on the shards at `shards` until `total_images`, in the run folder `out`.

    As `trainer.methods.trajectory_forcing.train.train`, and: raises TrainerError when the shards hold no pictures.
    """
    index = open_index(shards)
    config = fit_to_shards(config, index)
    with joined_world() as world, stop_signals() as stop:
        return _LatentRun(config, index, Path(out), resume, world, stop, quiet).train()


def fit_to_shards(
    config: LatentTrainConfig, index: ShardIndex, asked: Collection[str] = ()
) -> LatentTrainConfig:
    """The config with the model's grid, channels, classes and canvases as the shards and `pixel_stage` have them.

    asked: dotted names of the fields that were set on purpose. Raises MismatchError naming both values where one of
    these is not that of the shards.
    """
    found: dict[str, Any] = {
        "grid": index.grid,
        "in_channels": index.width,
        "num_classes": index.num_classes,
        "num_canvases": index.num_levels if config.pixel_stage else 1,
    }
    for name, value in found.items():
        wanted = getattr(config.model, name)
        if f"model.{name}" in asked and wanted != value:
            raise MismatchError(
                f"model.{name} is {wanted}, {index.url} holds {value}: leave it out, it comes from the shards"
            )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))


def latent_normaliser(config: LatentTrainConfig, index: ShardIndex, features: Tensor) -> Normaliser:
    """Raw features → latents of deviation `latent_scale`.

    features: float [b, H, W, C], some of the shards. Raises MismatchError when the statistics do not describe them,
    as those of another encoder do not, and what `shards.read_statistics` raises.
    """
    plain = normaliser_of(config.normalise, index)
    found = float(plain.apply(features.float()).square().mean().sqrt())
    if config.normalise != "none" and not 1 / FOREIGN < found < FOREIGN:
        raise MismatchError(
            f"{index.url}/{STATISTICS} does not describe these features: normalised by it, their root mean square is "
            f"{found:.3g}, expected about 1; run `hierarchy-builder shard DIR` again"
        )
    return Normaliser(mean=plain.mean, std=plain.std / config.method.latent_scale)


class _LatentRun(Loop):
    """One run of Latent Forcing in one process."""

    terms = ("loss", "loss_pixels", "loss_latents")
    shown = ("loss_pixels", "loss_latents")
    model: PixelLatentTransformer
    dataset: PictureDataset

    def __init__(
        self,
        config: LatentTrainConfig,
        index: ShardIndex,
        out: Path,
        resume: str,
        world: World,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        super().__init__(config, index, out, world, stop, quiet)
        self.plan = self._stream_plan()
        verify, max_damaged = config.verify_shards, config.max_damaged_shards
        size = config.model.image_px
        self.dataset = PictureDataset(index, self.plan, size, world.rank, world.size, verify, max_damaged)
        # Shards without pictures are refused before the start.
        some = self.dataset.samples(range(0, index.num_samples, -(-index.num_samples // CHECKED)))
        origin = find_origin(out, resume, world.is_main)
        check_same_run(out, origin, config, index)
        normaliser = (
            saved.load_normaliser(origin) if origin else latent_normaliser(config, index, some.features)
        )
        self.normaliser = normaliser.to(world.device)
        self.model = _fresh_model(config).to(world.device)
        self.model.recompute = config.activation_checkpointing
        self.objective = compiled(latent_forcing.loss) if config.compile else latent_forcing.loss
        self.optimizer = optimizer_of(self.model, config.optim)
        self.averages = WeightAverages(self.model, config.optim.ema_halflives_kimg, config.optim.ema_ramp)
        self._begin(origin)

    def _rate(self) -> float:
        config, optim = self.config, self.config.optim
        rate = learning_rate(self.images_seen, config.total_images, optim.lr, optim.cooldown_fraction)
        return rate * min(1.0, (self.images_seen + config.batch_size) / max(optim.warmup_images, 1))

    def _backward(self, batch: PictureBatch, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; returns their part of each of `terms`."""
        config, device = self.config, self.world.device
        first = self.world.rank * len(batch)
        part = batch.rows(start, stop).to(device)
        pixels = part.pictures.permute(0, 2, 3, 1).float() / 127.5 - 1
        latents = latents_of(
            part.features.float(), part.regions if config.pixel_stage else None, self.normaliser
        )
        method: LatentMethodConfig = config.method
        draws = latent_forcing.draw_batch(
            config.batch_size,
            pixels.shape[1:],
            latents.shape[1:],
            method,
            num_canvases=config.model.num_canvases,
            seed=config.seed,
            step=self.step,
            rows=slice(first + start, first + stop),
            device=device,
        )
        label = torch.where(draws.drop_label, config.model.num_classes, part.label)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            terms = self.objective(
                self.model,
                pixels,
                latents,
                label=label,
                noise_pixels=draws.noise_pixels,
                noise_latents=draws.noise_latents,
                latent_weight=method.latent_weight,
                time_floor=method.time_floor,
                **draws.clocks._asdict(),
            )
        share = len(part) / config.batch_size
        (terms["loss"] * share).backward()
        return torch.stack([terms[name] * share for name in self.terms]).detach().double()

    def _sheet(self) -> Image.Image:
        """Samples of the model as it is, with its first weight average where there is one."""
        with self._averaged():
            pipe = LatentPipeline(
                self.model,
                self.index.class_names,
                self.index.encoder,
                None,
                self.normaliser,
                method=self.config.method,
            )
            return pipeline_sheet(pipe)


def _fresh_model(config: LatentTrainConfig) -> PixelLatentTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PixelLatentTransformer(config.model)
