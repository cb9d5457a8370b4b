"""Training of RAE's ViT decoder, on pairs of features and pictures, for an encoder without a published decoder.

    b images of one pass, H×W grid of tokens, C channels, h×w pixels

The folder is a run folder that also holds the decoder as config.json and model.safetensors, with the tensor names of
RAE's release: `--decoder FOLDER` loads it, and a run of `trainer train` uses the decoder in its own folder `decoder`.

Source: RAE (Zheng et al. 2025), first stage. Differences: tokens are centred and scaled, and the written first layer
includes this map; noise is relative to the root mean square of the features, which is 1 for DINOv2 without affine
parameters; decoder and discriminator are updated in the same step; the crops of the shards are not augmented.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.files.whole import write_bytes, write_sealed_json
from trainer.data.folders import Places
from trainer.data.normalisation import Normaliser
from trainer.data.pictures import PictureBatch, PictureDataset
from trainer.data.reader import looked_at
from trainer.data.shards import open_index, read_statistics
from trainer.data.stream import StreamPlan
from trainer.data.tensor_files import tensor_bytes
from trainer.decode.adversary import (
    Discriminator,
    augmented,
    balanced_weight,
    hinge_for_discriminator,
    load_discriminator,
)
from trainer.decode.config import DecoderConfig
from trainer.decode.perceptual import load_lpips
from trainer.decode.rae import CONFIG, WEIGHTS, RaeDecoder, RaeDecoderConfig, rae_state, to_uint8
from trainer.metrics.reconstruction import reconstruction
from trainer.seeds import mixed_seed
from trainer.training.distributed import joined_world
from trainer.training.loop import Loop, RunSummary, stop_signals
from trainer.training.schedules import warmup_cosine
from trainer.training.weights import WeightAverages

MEASURED = 256
"""Largest number of pictures for measuring reconstruction, spread evenly over the held-out pictures, or over all."""
SHOWN = 8
"""Pictures on a sheet; the upper row has the originals, the lower row the reconstructions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSummary(RunSummary):
    """State of a decoder's training when it ended."""

    reconstruction: dict[str, float]
    """Scores of the averaged decoder, see `trainer.metrics.reconstruction`."""
    held_out: bool
    """Whether the scores are from pictures that were not used in training."""


def train_decoder(
    config: DecoderConfig, shards: Places, out: str, resume: str = "auto", quiet: bool = False
) -> DecoderSummary:
    """Train a decoder on the shards at `shards`, in the folder `out`; repeating the call resumes the training.

    Raises TrainerError if the shards hold no pictures, MismatchError if the grid is not square or `out` has another
    configuration, and what `trainer.training.method_run.run_method` raises when training is stopped.
    """
    index = open_index(shards)
    with joined_world() as world, stop_signals() as stop:
        run = DecoderRun(config, index, Path(out), resume, world, stop, quiet)
        summary = run.train()
        scores = run.measured()
    return DecoderSummary(**dataclasses.asdict(summary), reconstruction=scores, held_out=run.is_held_out)


class _Parts(nn.Module):
    """The trained modules: the decoder, and the discriminator if there is one."""

    def __init__(self, decoder: RaeDecoder, discriminator: Discriminator | None) -> None:
        super().__init__()
        self.decoder, self.discriminator = decoder, discriminator


class DecoderRun(Loop):
    """One training of a decoder in one process."""

    shown = ("l1",)
    rate_field = "lr"
    is_alike_in_parts = False  # the adversarial loss is balanced in each
    one_backward_pass = True
    model: _Parts
    dataset: PictureDataset
    phase: tuple[bool, bool] | None = None
    """What `_phase` said at the step before."""

    def _plan(self) -> StreamPlan:
        config, index = self.config, self.index
        rows, columns = index.grid
        if rows != columns:
            raise MismatchError(f"{index.url}: grid {rows}×{columns}, RAE's decoder expects a square one")
        self.shape = RaeDecoderConfig.of_size(config.size, index.width, rows, config.patch_size)
        sizes, held_out = tuple(shard.num_samples for shard in index.shards), config.held_out_shards
        if held_out >= len(sizes):
            raise UsageError(f"held_out_shards is {held_out}, {index.url} has {len(sizes)}: expected fewer")
        return self._stream_plan(sizes[: len(sizes) - held_out])

    def _dataset(self) -> PictureDataset:
        config, index, world = self.config, self.index, self.world
        size = (self.shape.image_size, self.shape.image_size)
        checks = (config.verify_shards, config.max_damaged_shards)
        dataset = PictureDataset(index, self.plan, size, world.rank, world.size, *checks)
        self.is_held_out = self.plan.num_samples < index.num_samples
        first, last = (self.plan.num_samples if self.is_held_out else 0), index.num_samples - 1
        count = min(MEASURED, last + 1 - first)
        self.measured_numbers = np.linspace(first, last, count).round().astype(int).tolist()
        # Refuses shards without pictures before training starts.
        dataset.samples([*self.measured_numbers[:1], *(numbers[0] for _, numbers in looked_at(index))])
        return dataset

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        mean, variance = read_statistics(self.index, ("channel_mean", "channel_variance"))
        self.sigma = self.config.noise * float(np.sqrt((variance + mean**2).mean()))
        # All channels are divided by one spread: a spread per channel would amplify noise in flat ones.
        spread = float(np.sqrt(variance.mean())) or 1.0
        return Normaliser(mean=torch.from_numpy(mean).float(), std=torch.tensor(spread))

    def _network(self) -> _Parts:
        weights = self.config.gan_weights
        discriminator = load_discriminator(weights) if weights else None
        return _Parts(RaeDecoder(self.shape), discriminator)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=self.config.lr, betas=self.config.adam_betas)

    def _averages(self) -> WeightAverages:
        return WeightAverages(self.model, (self.config.ema_halflife_kimg,))

    def _begin(self, origin: Path | None) -> None:
        weights = self.config.lpips_weights
        self.lpips = load_lpips(weights).to(self.world.device) if weights else None
        self.terms = ("loss", "l1")
        self.terms += ("lpips",) if self.lpips else ()
        self.terms += ("adversarial", "discriminator") if self.model.discriminator else ()
        super()._begin(origin)

    def _rate(self) -> float:
        config, seen = self.config, self.images_seen + self.config.batch_size
        return warmup_cosine(seen, config.total_images, config.lr, config.warmup_fraction)

    def take_step(self, batch: PictureBatch, time_is_up: bool) -> tuple[dict[str, float], str]:
        if self._phase() != self.phase:
            self.phase, self.flops_per_image = self._phase(), None  # to be counted anew
        return super().take_step(batch, time_is_up)

    def _phase(self) -> tuple[bool, bool]:
        """Whether the decoder is trained against the discriminator, and whether that is trained."""
        share = self.images_seen / self.config.total_images
        starts = self.config.gan_start, self.config.discriminator_start
        return share >= starts[0], share >= starts[1]

    def _trial(self, batch: PictureBatch, images: int) -> None:
        """Leaves the running statistics of the discriminator as they are."""
        judge = self.model.discriminator
        if judge:
            judge.eval()
        super()._trial(batch, images)
        if judge:
            judge.train()

    def backward(self, batch: PictureBatch, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; return their share of each term."""
        config, device = self.config, self.world.device
        part = batch.rows(start, stop).to(device)
        share = len(part) / config.batch_size
        first = self.world.rank * len(batch) + start
        pictures = part.pictures.float() / 255
        tokens = self.normaliser.apply(self._noisy(part.features.float(), first))
        with self._autocast():
            decoded = self.model.decoder(tokens).float()
        terms = {"l1": (decoded - pictures).abs().mean()}
        loss = terms["l1"]
        if self.lpips:
            terms["lpips"] = self.lpips(decoded, pictures).mean()
            loss = loss + config.lpips_weight * terms["lpips"]
        if self.model.discriminator:
            generator = self._generator(first, 1)
            terms["adversarial"], terms["discriminator"] = self._judge(decoded, pictures, loss, generator)
            loss = loss + terms["adversarial"]
        ((loss + terms.get("discriminator", 0.0)) * share).backward()
        return torch.stack([loss, *terms.values()]).detach().double() * share

    def _judge(
        self, decoded: Tensor, pictures: Tensor, loss: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's weighted adversarial loss and the discriminator's loss, each 0 until it starts."""
        config, judge = self.config, self.model.discriminator
        assert judge is not None
        adversarial = discriminator = decoded.new_zeros(())
        is_against, is_trained = self._phase()
        if is_against:
            judge.requires_grad_(False)
            deceived = -judge(augmented(decoded, generator)).mean()
            judge.requires_grad_(True)
            balance = balanced_weight(loss, deceived, self.model.decoder.predict.weight)
            adversarial = config.gan_weight * balance * deceived
        if is_trained:
            logits = (judge(augmented(each, generator)) for each in (pictures, decoded.detach()))
            discriminator = hinge_for_discriminator(*logits)
        return adversarial, discriminator

    def _noisy(self, features: Tensor, first: int) -> Tensor:
        """Add noise to features [b, H, W, C], which are the rows of the global batch from `first` on."""
        noises = []
        for row in range(first, first + len(features)):
            generator = self._generator(row, 0)
            sigma = self.sigma * torch.rand((), generator=generator, device=features.device)
            noise = torch.randn(features.shape[1:], generator=generator, device=features.device)
            noises.append(sigma * noise)
        return features + torch.stack(noises)

    def _generator(self, row: int, use: int) -> torch.Generator:
        seed = mixed_seed(self.config.seed, self.step, row, use)
        return torch.Generator(self.world.device).manual_seed(seed)

    def measured(self) -> dict[str, float]:
        """Score the averaged decoder on held-out pictures; if none are held out, on pictures used in training."""
        made, truth = [], []
        for start in range(0, len(self.measured_numbers), 32):
            batch = self.dataset.samples(self.measured_numbers[start : start + 32])
            made.append(self._decode(batch))
            truth.append(batch.pictures.permute(0, 2, 3, 1).numpy())
        return dict(reconstruction(np.concatenate(made), np.concatenate(truth)))

    @torch.no_grad()
    def _decode(self, batch: PictureBatch) -> np.ndarray:
        """Decode with the averaged weights and without noise: uint8 [b, h, w, 3]."""
        tokens = self.normaliser.apply(batch.features.to(self.world.device).float())
        with self.averages.lent_to(self.model, self.config.ema_halflife_kimg):
            return to_uint8(self.model.decoder(tokens)).cpu().numpy()

    def _audit(self) -> dict[str, Any]:
        return {"reconstruction": {**self.measured(), "held_out": self.is_held_out}, **super()._audit()}

    def _sheet(self) -> Image.Image:
        """Draw pictures in the upper row and their reconstructions by the averaged decoder below."""
        step = max(1, len(self.measured_numbers) // SHOWN)
        batch = self.dataset.samples(self.measured_numbers[::step][:SHOWN])
        rows = (batch.pictures.permute(0, 2, 3, 1).numpy(), self._decode(batch))
        return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))

    def _save(self) -> Path:
        """Also write the averaged decoder, each file atomically, for `trainer.decode.rae.load_decoder`."""
        folder = super()._save()
        if self.world.is_main:
            average = self.averages.averages[self.config.ema_halflife_kimg]
            weights = {n.removeprefix("decoder."): w for n, w in average.items() if n.startswith("decoder.")}
            tensors = rae_state(_folded(weights, self.normaliser))
            write_bytes(self.out / WEIGHTS[0], tensor_bytes(tensors, {}))
            config = {**dataclasses.asdict(self.shape), "encoder": dict(self.index.encoder)}
            write_sealed_json(self.out / CONFIG, config, sort_keys=False)
        return folder


def _folded(weights: dict[str, Tensor], normaliser: Normaliser) -> dict[str, Tensor]:
    """Fold the normaliser into the first layer, for raw features: W(x − m)/s + b = (W/s)x + b − W(m/s)."""
    weight = weights["embed.weight"] / normaliser.std
    bias = weights["embed.bias"] - weight @ normaliser.mean
    return {**weights, "embed.weight": weight, "embed.bias": bias}
