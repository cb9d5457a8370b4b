"""What the trainings of all methods do alike: from shards and a configuration to the loop, step by step.

A method subclasses `MethodRun` and says which data it reads, which network it trains, what it draws for a step, and
how its terms become a loss. A step's draws are functions of (seed, step) for the whole global batch, and each rank
takes its rows. Every part of the loss is scaled to the global batch before `backward`, so that gradients are summed,
not averaged, over micro-batches and ranks, and any split of the batch takes the same steps.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, TrainerError
from trainer.data.normalisation import Normaliser, normaliser_of
from trainer.data.shards import ShardIndex
from trainer.data.stream import BatchDataset, StreamPlan
from trainer.training import checkpoint as saved
from trainer.training.config import MethodRunConfig
from trainer.training.distributed import World, joined_world
from trainer.training.loop import Loop, RunSummary, StopRequest, stop_signals
from trainer.training.optim import optimizer_of
from trainer.training.run_folder import check_same_run, find_origin
from trainer.training.weights import WeightAverages

Objective = Callable[..., dict[str, Tensor]]
ConfigT = TypeVar("ConfigT", bound=MethodRunConfig)


class MethodRun(Loop):
    """One run of a method in one process."""

    loss_function: ClassVar[Objective]
    """The objective, which `compile` compiles: (network, …) → terms by name."""
    pipeline: ClassVar[Callable[..., Any]]
    """The class that draws samples of the network, whose `sheet` is a picture of some."""

    def __init__(
        self,
        config: Any,
        index: ShardIndex,
        out: Path,
        resume: str,
        world: World,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        super().__init__(config, index, out, world, stop, quiet)
        self.plan = self._plan()
        self.dataset = self._dataset()
        origin = find_origin(out, resume, world.is_main)
        check_same_run(out, origin, config, index)
        self.normaliser = self._first_normaliser(origin).to(world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = self._network().to(world.device)
        for module in self.model.modules():
            if hasattr(module, "recompute"):
                module.recompute = config.activation_checkpointing
        loss = type(self).loss_function
        self.objective = compiled(loss) if config.compile else loss
        self.optimizer = self._optimizer()
        self.averages = WeightAverages(self.model, config.optim.ema_halflives_kimg, config.optim.ema_ramp)
        self._begin(origin)

    @abstractmethod
    def _network(self) -> nn.Module:
        """The network as a run begins with it; torch's global generator holds the seed of the run."""

    @abstractmethod
    def _terms(self, part: Any, rows: slice) -> dict[str, Tensor]:
        """The terms of some rows of a batch. rows: their places in the global batch."""

    def _plan(self) -> StreamPlan:
        """The order of the samples."""
        return self._stream_plan()

    def _dataset(self) -> Any:
        """The shards as batches. Raises TrainerError where they lack what the method needs."""
        config, world = self.config, self.world
        return BatchDataset(
            self.index, self.plan, world.rank, world.size, config.verify_shards, config.max_damaged_shards
        )

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        """The normaliser of the checkpoint `origin`, else the one that the configuration asks for."""
        return saved.load_normaliser(origin) if origin else normaliser_of(self.config.normalise, self.index)

    def _optimizer(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model, self.config.optim)

    def _scaled(self, terms: Mapping[str, Tensor], part: Any) -> dict[str, Tensor]:
        """Each of `self.terms` as its part of the mean over the global batch; gradients are those of `loss`."""
        share = len(part) / self.config.batch_size
        return {name: terms[name] * share for name in self.terms}

    def backward(self, batch: Any, start: int, stop: int) -> Tensor:
        device, first = self.world.device, self.world.rank * len(batch)
        part = batch.rows(start, stop).to(device)
        terms = self._scaled(self._terms(part, slice(first + start, first + stop)), part)
        terms["loss"].backward()
        return torch.stack([terms[name] for name in self.terms]).detach().double()

    def _sheet(self) -> Image.Image:
        with self._averaged():
            names, encoder = self.index.class_names, self.index.encoder
            pipe = type(self).pipeline(
                self.model, names, encoder, self._decoder(), self.normaliser, method=self.config.method
            )
            sheet: Image.Image = pipe.sheet()
        self.model.train()
        return sheet

    def _decoder(self) -> Any:
        """What decodes the samples of a sheet; None shows the features as colours, or pixels that are drawn."""
        return None

    def _autocast(self) -> torch.autocast:
        """The arithmetic of the network."""
        is_short = self.config.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=is_short)


def run_method(
    run: type[MethodRun], config: Any, index: ShardIndex, out: str, resume: str, quiet: bool
) -> RunSummary:
    """Train until `total_images` in the run folder `out`, in every process that torchrun started.

    resume: `auto` goes on from the newest checkpoint of `out` if there is one, `never` asks for a fresh folder,
    else a run or checkpoint folder to start from. Raises MismatchError when `out` was made with another
    configuration or other shards, InterruptedRunError after a checkpoint on SIGTERM, SIGUSR1 or `max_seconds`,
    KeyboardInterrupt after one on Ctrl-C, and NonFiniteLossError when the loss or a gradient is not finite.
    """
    with joined_world() as world, stop_signals() as stop:
        return run(config, index, Path(out), resume, world, stop, quiet).train()


def with_model(config: ConfigT, index: ShardIndex, asked: Collection[str] = (), **more: Any) -> ConfigT:
    """The config with the model's grid, channels and classes as the shards have them, and the fields `more`.

    asked: dotted names of the fields that were set on purpose. Raises MismatchError naming both values where one
    of these fields has another value in the shards.
    """
    model = config.model  # type: ignore[attr-defined]
    found = {"grid": index.grid, "in_channels": index.width, "num_classes": index.num_classes, **more}
    for name, value in found.items():
        if f"model.{name}" in asked and getattr(model, name) != value:
            raise MismatchError(
                f"model.{name} is {getattr(model, name)}, {index.url} holds {value}: leave it out, it comes from the "
                "shards"
            )
    return dataclasses.replace(config, model=dataclasses.replace(model, **found))  # type: ignore[call-arg]


def compiled(objective: Objective) -> Objective:
    """`objective` compiled into one graph, tangents included, once for every shape.

    A call raises TrainerError where this machine cannot compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # loading it takes as long as torch itself

    fast = torch.compile(objective, fullgraph=True, dynamic=False)

    def call(*inputs: Any, **named: Any) -> dict[str, Tensor]:
        try:
            return fast(*inputs, **named)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise TrainerError(f"compile: {reason}; train with --set compile=false") from error

    return call
