"""Training of Latent Forcing on shards with pictures; see `trainer.training.method_run` for the shared part.

Latents are normalised by the exact statistics of the shards and scaled to about the standard deviation of pixels,
because a change of scale acts like a shift in time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.normalisation import Normaliser
from trainer.data.pictures import PictureBatch, PictureDataset
from trainer.data.reader import looked_at
from trainer.data.shards import ShardIndex
from trainer.methods.latent_forcing import objective as latent_forcing
from trainer.methods.latent_forcing.config import LatentTrainConfig
from trainer.methods.latent_forcing.pipeline import LatentPipeline
from trainer.methods.latent_forcing.pixel_stage import side_by_side
from trainer.seeds import StepRows
from trainer.training.method_run import MethodRun, with_model


class LatentForcingRun(MethodRun):
    """One run of Latent Forcing in one process."""

    terms = ("loss", "loss_pixels", "loss_latents")
    shown = ("loss_pixels", "loss_latents")
    pipeline = LatentPipeline
    loss_function = staticmethod(latent_forcing.loss)
    dataset: PictureDataset

    @classmethod
    def fitted(
        cls, config: LatentTrainConfig, index: ShardIndex, asked: Collection[str] = ()
    ) -> LatentTrainConfig:
        return with_model(config, index, asked, num_canvases=index.num_levels if config.pixel_stage else 1)

    def _dataset(self) -> PictureDataset:
        config, world, size_px = self.config, self.world, self.config.model.image_px
        limits = (config.verify_shards, config.max_damaged_shards)
        dataset = PictureDataset(self.index, self.plan, size_px, world.rank, world.size, *limits)
        # Read before the run folder is changed, so that shards without pictures are refused in time.
        dataset.samples([numbers[0] for _, numbers in looked_at(self.index)])
        return dataset

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        """The map from raw features to latents of standard deviation `latent_scale`."""
        plain = super()._first_normaliser(origin)
        return plain if origin else replace(plain, std=plain.std / self.config.method.latent_scale)

    def _rate(self) -> float:
        warmed_up = (self.images_seen + self.config.batch_size) / max(self.config.optim.warmup_images, 1)
        return super()._rate() * min(1.0, warmed_up)

    def _terms(self, part: PictureBatch, rows: StepRows) -> dict[str, Tensor]:
        config, method = self.config, self.config.method
        pixels = part.pictures.permute(0, 2, 3, 1).float() / 127.5 - 1
        normaliser = self.normaliser
        latents = side_by_side(part.canvases(normaliser)) if config.pixel_stage else part.tokens(normaliser)
        draws = latent_forcing.draw_batch(
            rows, pixels.shape[1:], latents.shape[1:], method, config.model.num_canvases
        )
        label = torch.where(draws.drop_label, config.model.num_classes, part.label)
        with self._autocast():
            return self.objective(
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
