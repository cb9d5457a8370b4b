"""Training of the toy method: the loop of every training with the mean squared error of canvases."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from trainer.training.stopping import StopRequest, stop_signals

from toy_method.config import ToyTrainConfig
from toy_method.network import ToyNetwork
from toy_method.pipeline import ToyPipeline
from trainer.data.shards import ShardIndex, open_index
from trainer.data.stream import Batch, BatchDataset
from trainer.training.distributed import World, joined_world
from trainer.training.loop import Loop, RunSummary
from trainer.training.run_folder import check_same_run, find_origin
from trainer.training.weights import WeightAverages


def fit_to_shards(config: ToyTrainConfig, index: ShardIndex, asked: Collection[str] = ()) -> ToyTrainConfig:
    """The configuration with the sizes of the shards."""
    model = dataclasses.replace(
        config.model,
        grid=index.grid,
        in_channels=index.width,
        num_levels=index.num_levels,
        num_classes=index.num_classes,
    )
    return dataclasses.replace(config, model=model)


def train(
    config: ToyTrainConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False
) -> RunSummary:
    """Train until `total_images`."""
    index = open_index(shards)
    config = fit_to_shards(config, index)
    with joined_world() as world, stop_signals() as stop:
        return _ToyRun(config, index, Path(out), resume, world, stop, quiet).train()


class _ToyRun(Loop):
    terms = ("loss",)
    shown = ("loss",)
    model: ToyNetwork

    def __init__(
        self,
        config: ToyTrainConfig,
        index: ShardIndex,
        out: Path,
        resume: str,
        world: World,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        super().__init__(config, index, out, world, stop, quiet)
        self.plan = self._stream_plan()
        self.dataset = BatchDataset(index, self.plan, world.rank, world.size)
        origin = find_origin(out, resume, world.is_main)
        check_same_run(out, origin, config, index)
        self.model = ToyNetwork(config.model).to(world.device)
        self.optimizer = torch.optim.AdamW(
            list(self.model.named_parameters()), lr=config.optim.lr, weight_decay=0.0
        )
        self.averages = WeightAverages(self.model, config.optim.ema_halflives_kimg)
        self._begin(origin)

    def _rate(self) -> float:
        return self.config.optim.lr

    def _backward(self, batch: Batch, start: int, stop: int) -> Tensor:
        part = batch.rows(start, stop).to(self.world.device)
        x, _, _ = part.targets(self.normaliser)
        error = (self.model(part.label, part.level) - x).square().mean()
        loss = error * len(part) / self.config.batch_size
        loss.backward()
        return loss.detach().double()[None]

    def _sheet(self) -> Image.Image:
        with self._averaged():
            names, encoder = self.index.class_names, self.index.encoder
            return ToyPipeline(self.model, names, encoder, method=self.config.method).sheet()
