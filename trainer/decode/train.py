"""Training a decoder for an encoder that has none: features and their pictures in, RAE's ViT decoder out.

    b images of one pass, H×W grid of tokens, C channels, h×w pixels

The folder is a run folder, and the decoder lies in it as config.json and model.safetensors under the names of RAE's
release: `--decoder FOLDER` takes it, and a run of `trainer train` finds it in its own folder `decoder`.

Source: RAE (Zheng et al. 2025), first stage. Deviations: tokens are centred and scaled, which is folded into the
first layer of what is written; noise is measured in root mean squares of the features, which are 1 for DINOv2 without
affine; decoder and discriminator step together; the shards' crops are used as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.files import write_bytes
from trainer.data.normalisation import Normaliser
from trainer.data.pictures import PictureBatch, PictureDataset
from trainer.data.shards import ShardIndex, open_index, read_statistics
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
from trainer.training.distributed import World, joined_world
from trainer.training.loop import Loop, RunSummary, StopRequest, stop_signals
from trainer.training.run_folder import check_same_run, find_origin
from trainer.training.schedules import warmup_cosine
from trainer.training.weights import WeightAverages

MEASURED = 256
"""Pictures that reconstruction is measured on, at most, spread evenly over those held out, or over all."""
SHOWN = 8
"""Pictures on a sheet: above as they are, below as decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSummary(RunSummary):
    """How a training of a decoder ended."""

    reconstruction: dict[str, float]
    """Scores of the averaged decoder, see `trainer.metrics.reconstruction`."""
    held_out: bool
    """Whether they are of pictures that were not trained on."""


def train_decoder(
    config: DecoderConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False
) -> DecoderSummary:
    """Train a decoder on the shards at `shards`, in the folder `out`; the same call goes on there.

    Raises TrainerError when the shards hold no pictures, MismatchError for a grid that is not square or another
    configuration in `out`, and what `trainer.methods.trajectory_forcing.train.train` raises when it is stopped.
    """
    index = open_index(shards)
    with joined_world() as world, stop_signals() as stop:
        run = DecoderRun(config, index, Path(out), resume, world, stop, quiet)
        summary = run.train()
        scores = run.measured()
    return DecoderSummary(**dataclasses.asdict(summary), reconstruction=scores, held_out=run.is_held_out)


class _Parts(nn.Module):
    """All that is trained: the decoder, and the discriminator where there is one."""

    def __init__(self, decoder: RaeDecoder, discriminator: Discriminator | None) -> None:
        super().__init__()
        self.decoder, self.discriminator = decoder, discriminator


class DecoderRun(Loop):
    """One training of a decoder in one process."""

    shown = ("l1",)
    rate_field = "lr"
    model: _Parts
    dataset: PictureDataset

    def __init__(
        self,
        config: DecoderConfig,
        index: ShardIndex,
        out: Path,
        resume: str,
        world: World,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        super().__init__(config, index, out, world, stop, quiet)
        self.shape = _decoder_shape(config, index)
        self.plan = self._stream_plan(_trained_sizes(config, index))
        size = (self.shape.image_size, self.shape.image_size)
        verify, max_damaged = config.verify_shards, config.max_damaged_shards
        self.dataset = PictureDataset(index, self.plan, size, world.rank, world.size, verify, max_damaged)
        self.is_held_out = self.plan.num_samples < index.num_samples
        first, last = (self.plan.num_samples if self.is_held_out else 0), index.num_samples - 1
        count = min(MEASURED, last + 1 - first)
        self.measured_numbers = np.linspace(first, last, count).round().astype(int).tolist()
        self.dataset.samples(
            self.measured_numbers[:1]
        )  # shards without pictures are refused before the start
        origin = find_origin(out, resume, world.is_main)
        check_same_run(out, origin, config, index)
        mean, variance = read_statistics(index, ("channel_mean", "channel_variance"))
        self.normaliser = _centred(mean, variance).to(world.device)
        self.sigma = config.noise * float(np.sqrt((variance + mean**2).mean()))
        self.model = _fresh_parts(config, self.shape).to(world.device)
        self.lpips = load_lpips(config.lpips_weights).to(world.device) if config.lpips_weights else None
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.lr, betas=config.adam_betas)
        self.averages = WeightAverages(self.model, (config.ema_halflife_kimg,))
        self.terms = ("loss", "l1")
        self.terms += ("lpips",) if self.lpips else ()
        self.terms += ("adversarial", "discriminator") if self.model.discriminator else ()
        self._begin(origin)

    def _rate(self) -> float:
        config, seen = self.config, self.images_seen + self.config.batch_size
        return warmup_cosine(seen, config.total_images, config.lr, config.warmup_fraction)

    def backward(self, batch: PictureBatch, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; returns their part of each term."""
        config, device = self.config, self.world.device
        part = batch.rows(start, stop).to(device)
        share = len(part) / config.batch_size
        first = self.world.rank * len(batch) + start
        pictures = part.pictures.float() / 255
        tokens = self.normaliser.apply(self._noisy(part.features.float(), first))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
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
        """(weighted loss of the decoder against the discriminator, loss of the discriminator); 0 before their time."""
        config, judge = self.config, self.model.discriminator
        assert judge is not None
        adversarial = discriminator = decoded.new_zeros(())
        share = self.images_seen / config.total_images
        if share >= config.gan_start:
            judge.requires_grad_(False)
            deceived = -judge(augmented(decoded, generator)).mean()
            judge.requires_grad_(True)
            balance = balanced_weight(loss, deceived, self.model.decoder.predict.weight)
            adversarial = config.gan_weight * balance * deceived
        if share >= config.discriminator_start:
            logits = (judge(augmented(each, generator)) for each in (pictures, decoded.detach()))
            discriminator = hinge_for_discriminator(*logits)
        return adversarial, discriminator

    def _noisy(self, features: Tensor, first: int) -> Tensor:
        """Features [b, H, W, C] with noise of their rows of the global batch, counted from `first`."""
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
        """Scores of the averaged decoder on pictures held out, or where none are on some of those trained on."""
        made, truth = [], []
        for start in range(0, len(self.measured_numbers), 32):
            batch = self.dataset.samples(self.measured_numbers[start : start + 32])
            made.append(self._decode(batch))
            truth.append(batch.pictures.permute(0, 2, 3, 1).numpy())
        return dict(reconstruction(np.concatenate(made), np.concatenate(truth)))

    @torch.no_grad()
    def _decode(self, batch: PictureBatch) -> np.ndarray:
        """uint8 [b, h, w, 3] of the averaged weights, without noise."""
        tokens = self.normaliser.apply(batch.features.to(self.world.device).float())
        with self.averages.lent_to(self.model, self.config.ema_halflife_kimg):
            return to_uint8(self.model.decoder(tokens)).cpu().numpy()

    def _audit(self) -> dict[str, Any]:
        return {"reconstruction": {**self.measured(), "held_out": self.is_held_out}, **super()._audit()}

    def _sheet(self) -> Image.Image:
        """Pictures above, and below them what the averaged decoder makes of their features."""
        step = max(1, len(self.measured_numbers) // SHOWN)
        batch = self.dataset.samples(self.measured_numbers[::step][:SHOWN])
        rows = (batch.pictures.permute(0, 2, 3, 1).numpy(), self._decode(batch))
        return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))

    def _save(self) -> Path:
        folder = super()._save()
        if self.world.is_main:
            average = self.averages.averages[self.config.ema_halflife_kimg]
            weights = {n.removeprefix("decoder."): w for n, w in average.items() if n.startswith("decoder.")}
            publish(self.out, self.model.decoder, _folded(weights, self.normaliser), self.index.encoder)
        return folder


def publish(
    folder: Path, decoder: RaeDecoder, weights: Mapping[str, Tensor], encoder: Mapping[str, Any]
) -> None:
    """Write config.json and model.safetensors, each whole or not at all, as
    `trainer.decode.rae.load_decoder` reads them.

    weights: stand in for those of `decoder`. encoder: the description of whose features it decodes.
    """
    config = {**dataclasses.asdict(decoder.config), "encoder": dict(encoder)}
    files = {
        WEIGHTS[0]: safetensors.torch.save(rae_state(decoder, weights)),
        CONFIG: json.dumps(config, indent=1).encode(),
    }
    for name, data in files.items():
        write_bytes(folder / name, data)


def _centred(mean: np.ndarray, variance: np.ndarray) -> Normaliser:
    """Channels of mean 0, all in units of one spread: a spread of each would blow up the noise of those at rest."""
    spread = float(np.sqrt(variance.mean())) or 1.0
    return Normaliser(mean=torch.from_numpy(mean).float(), std=torch.tensor(spread))


def _folded(weights: dict[str, Tensor], normaliser: Normaliser) -> dict[str, Tensor]:
    """Weights that do to raw features what `weights` do to normalised ones: W(x − m)/s + b = (W/s)x + b − W(m/s)."""
    weight = weights["embed.weight"] / normaliser.std
    bias = weights["embed.bias"] - weight @ normaliser.mean
    return {**weights, "embed.weight": weight, "embed.bias": bias}


def _decoder_shape(config: DecoderConfig, index: ShardIndex) -> RaeDecoderConfig:
    rows, columns = index.grid
    if rows != columns:
        raise MismatchError(f"{index.url}: grid {rows}×{columns}, RAE's decoder expects a square one")
    return RaeDecoderConfig.of_size(config.size, index.width, rows, config.patch_size)


def _trained_sizes(config: DecoderConfig, index: ShardIndex) -> tuple[int, ...]:
    sizes = tuple(shard.num_samples for shard in index.shards)
    if config.held_out_shards >= len(sizes):
        raise UsageError(
            f"held_out_shards is {config.held_out_shards}, {index.url} has {len(sizes)}: expected fewer"
        )
    return sizes[: len(sizes) - config.held_out_shards]


def _fresh_parts(config: DecoderConfig, shape: RaeDecoderConfig) -> _Parts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        discriminator = load_discriminator(config.gan_weights) if config.gan_weights else None
        return _Parts(RaeDecoder(shape), discriminator)
