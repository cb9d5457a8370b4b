"""Training of a method: the base class of every method's run, which turns shards and a configuration into a loop.

A method subclasses `MethodRun` and defines which data it reads, which network it trains, what it draws for a step, and
how its terms are combined into a loss. Post-training, whose loss is of a whole batch, subclasses `NetworkRun`.

The random numbers of a step depend only on (seed, step, row of the global batch), and each rank takes its rows. Every
part of the loss is scaled to the global batch before `backward`, so gradients are summed, not averaged, over
micro-batches and ranks: any split of the batch takes the same steps.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.terminal import counted
from trainer.data.normalisation import Normaliser, check_describes, chosen_normalisation, normaliser_of
from trainer.data.reader import Rows, ShardReader, looked_at
from trainer.data.shards import ShardIndex
from trainer.data.stream import BatchDataset, StreamPlan
from trainer.training import checkpoint as saved
from trainer.training.config import MethodRunConfig
from trainer.training.distributed import World, joined_world
from trainer.training.loop import Loop, RunSummary, StopRequest, stop_signals
from trainer.training.optim import optimizer_of
from trainer.training.run_folder import check_same_run, find_origin, settled
from trainer.training.speed import counted_flops, images_that_fit
from trainer.training.weights import WeightAverages

Objective = Callable[..., dict[str, Tensor]]
ConfigT = TypeVar("ConfigT", bound=MethodRunConfig)
DrawsT = TypeVar("DrawsT")

LOOKED_AT = 64
"""Samples that are compared with the statistics before training, and read at a time."""


class NetworkRun(Loop):
    """One run of a network in one process: its data, optimiser, weight averages and normaliser."""

    pipeline: Any
    """Class of the method's pipeline; its `sheet()` draws the samples shown during training."""

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
        self.config = config = settled(config, out, origin, world.device)
        check_same_run(out, origin, config, index)
        self.origin = origin
        self.normaliser = self._first_normaliser(origin).to(world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = self._network().to(world.device)
        for module in self.model.modules():
            if hasattr(module, "recompute"):
                module.recompute = config.activation_checkpointing
        self.optimizer = self._optimizer()
        self.averages = self._averages()
        self._begin(origin)

    fitting: int | None = None
    """Images in one backward pass as they were chosen for the memory of the device."""
    is_alike_in_parts = True
    """Whether a batch gives the same gradient whatever its parts, so that one may be chosen by memory."""

    def take_step(self, batch: Any, time_is_up: bool) -> tuple[dict[str, float], str]:
        if self.world.device.type == "cuda" and self.flops_per_image is None:
            self._look_at_cost(batch)
        return super().take_step(batch, time_is_up)

    def _micro_batch(self, batch: Any) -> int:
        return min(self.fitting or len(batch), super()._micro_batch(batch))

    def _look_at_cost(self, batch: Any) -> None:
        """Count the operations of an image and, if no micro-batch is configured, the memory that one takes."""
        device, peaks = self.world.device, []
        self.flops_per_image = float(counted_flops(lambda: self._trial(batch, 1)))
        chooses = self.config.micro_batch_size is None and self.is_alike_in_parts
        for images in (1, 2) if chooses and len(batch) > 1 else ():
            torch.cuda.reset_peak_memory_stats(device)
            self._trial(batch, images)
            peaks.append(torch.cuda.max_memory_allocated(device))
        if peaks:
            moments = 8 * sum(p.numel() for p in self.model.parameters())  # which the optimiser will take
            held = 0 if self.optimizer.state else moments  # a resumed run has them
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - peaks[0] - held
            fitting = torch.tensor([images_that_fit(len(batch), peaks[1] - peaks[0], free)], device=device)
            self.fitting = int(self.world.gather(fitting).min())
        self.optimizer.zero_grad(set_to_none=True)

    def _trial(self, batch: Any, images: int) -> None:
        """Do what a step does for `images` images of a batch, leaving nothing but gradients."""
        self.backward(batch, 0, images)

    @abstractmethod
    def _network(self) -> nn.Module:
        """Build the initial network; torch's global generator is seeded with the seed of the run."""

    def _plan(self) -> StreamPlan:
        """Return the order in which samples are read."""
        return self._stream_plan()

    def _dataset(self) -> Any:
        """Open the shards as batches. Raises TrainerError if they lack data that the method needs."""
        config, world = self.config, self.world
        return BatchDataset(
            self.index, self.plan, world.rank, world.size, config.verify_shards, config.max_damaged_shards
        )

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        """Return the normaliser of the checkpoint `origin`, or without one that of the configuration.

        Raises MismatchError if the statistics do not describe the shards.
        """
        if origin:
            return saved.load_normaliser(origin)
        self._check_statistics()
        return normaliser_of(self.config.normalise, self.index)

    def _check_statistics(self) -> None:
        """Raise MismatchError if the statistics of a set do not describe its samples."""
        kind = self.config.normalise
        for part, first in looked_at(self.index) if kind != "none" else ():
            check_describes(normaliser_of(kind, part), self._first_samples(part, first).raw_features(), part)

    def _first_samples(self, part: ShardIndex | None = None, first: int = 0) -> Rows:
        """Read a few samples of the first shard.

        part, first: the set whose first shard it is, and the number of its first sample; None for the first set.
        """
        count = min(LOOKED_AT, (part or self.index).shards[0].num_samples)
        return next(self._samples(range(first, first + count)))

    def _samples(self, numbers: Sequence[int]) -> Iterator[Rows]:
        """Read samples by number, some at a time."""
        reader = ShardReader(
            self.index, verifies=lambda shard: False, max_damaged=self.config.max_damaged_shards
        )
        for first in range(0, len(numbers), LOOKED_AT):
            yield reader.read_rows(numbers[first : first + LOOKED_AT])
        reader.close()

    def _optimizer(self) -> torch.optim.Optimizer:
        is_short = self.world.device.type == "cuda" and self.config.precision == "bfloat16"
        return optimizer_of(self.model, self.config.optim, self.world, is_short)

    def _averages(self) -> WeightAverages:
        optim = self.config.optim
        return WeightAverages(self.model, optim.ema_halflives_kimg, optim.ema_ramp)

    def _sheet(self) -> Image.Image:
        with self._averaged():
            names, encoder = self.index.class_names, self.index.encoder
            pipe = self.pipeline(
                self.model, names, encoder, self._decoder(), self.normaliser, method=self.config.method
            )
            pipe.classes = self.classes
            sheet: Image.Image = pipe.sheet()
        self.model.train()
        return sheet

    def _decoder(self) -> Any:
        """Return the decoder for the sheet of samples; None shows features as colours, or the pixels of the samples."""
        return None

    def _autocast(self) -> torch.autocast:
        """Return the context in which the network computes in the configured precision."""
        is_short = self.config.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=is_short)


class MethodRun(NetworkRun):
    """One run of a method in one process, whose loss is a sum over the samples of a batch."""

    one_backward_pass = True
    loss_function: ClassVar[Objective]
    """The method's loss, (network, …) → terms by name; compiled if the configuration sets `compile`."""

    @classmethod
    def fitted(cls, config: Any, index: ShardIndex, asked: Collection[str] = ()) -> Any:
        """Return the config with the sizes of the shards, see `with_model`; methods add what they choose by them."""
        return with_model(config, index, asked, num_levels=index.num_levels)

    @cached_property
    def objective(self) -> Objective:
        """The loss as it is called."""
        loss, config = type(self).loss_function, self.config
        if config.compile is None:
            by_default = self.world.device.type == "cuda" and not config.activation_checkpointing
            return compiled(loss, or_eager=True) if by_default else loss
        return compiled(loss) if config.compile else loss

    @abstractmethod
    def _terms(self, part: Any, rows: slice) -> dict[str, Tensor]:
        """Compute the loss terms of `part`, which holds the rows `rows` of the global batch."""

    def _draw(self, draw_batch: Callable[..., DrawsT], rows: slice, *inputs: Any, **options: Any) -> DrawsT:
        """Call the method's `draw_batch(batch size, *inputs, **options)` for `rows` of the current step."""
        config, place = self.config, {"step": self.step, "rows": rows, "device": self.world.device}
        return draw_batch(config.batch_size, *inputs, seed=config.seed, **place, **options)

    def _scaled(self, terms: Mapping[str, Tensor], part: Any) -> dict[str, Tensor]:
        """Scale each of `self.terms` to its share of the mean over the global batch; `loss` is differentiated."""
        share = len(part) / self.config.batch_size
        return {name: terms[name] * share for name in self.terms}

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> dict[str, float]:
        """Raises TrainerError if a parameter has no gradient, because it would stay as it is without a word."""
        if lost := [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]:
            raise TrainerError(
                f"step {self.step}: {counted(len(lost), 'parameter')} got no gradient, the first is {lost[0]}: use "
                f"another release of torch than {torch.__version__}, or train with --set precision=float32"
            )
        return super()._sum_gradients(parameters)

    def _trial(self, batch: Any, images: int) -> None:
        """Goes through the loss as it is written, since the compiler hides what is counted."""
        objective, self.objective = self.objective, type(self).loss_function
        super()._trial(batch, images)
        self.objective = objective

    def backward(self, batch: Any, start: int, stop: int) -> Tensor:
        device, first = self.world.device, self.world.rank * len(batch)
        part = batch.rows(start, stop).to(device)
        terms = self._scaled(self._terms(part, slice(first + start, first + stop)), part)
        terms["loss"].backward()
        return torch.stack([terms[name] for name in self.terms]).detach().double()


def run_method(
    run: type[MethodRun], config: Any, index: ShardIndex, out: str, resume: str, quiet: bool
) -> RunSummary:
    """Train until `total_images` in the run folder `out`, in every process that torchrun started.

    resume: `auto` continues from the newest checkpoint of `out`, if any; `never` refuses a folder with checkpoints;
    anything else is a run or checkpoint folder to start from. Raises MismatchError if `out` was made with another
    configuration or other shards, InterruptedRunError (after writing a checkpoint) on SIGTERM, SIGUSR1 or
    `max_seconds`, KeyboardInterrupt (after writing a checkpoint) on Ctrl-C, and NonFiniteLossError if the loss or a
    gradient is not finite.
    """
    if config.post_training is not None:
        raise MismatchError(
            f"{out} is post-trained: repeat its `trainer post-train` command to continue it, or train into another "
            "--out"
        )
    with joined_world() as world, stop_signals() as stop:
        return run(config, index, Path(out), resume, world, stop, quiet).train()


def with_model(config: ConfigT, index: ShardIndex, asked: Collection[str] = (), **more: Any) -> ConfigT:
    """Return the config with the model's grid, channels and classes set from the shards, and the fields `more`.

    Normalisation `auto` is replaced by what `chosen_normalisation` finds. asked: dotted names of the fields that the
    user set. Raises MismatchError with both values if one of these fields has another value in the shards.
    """
    model = config.model  # type: ignore[attr-defined]
    found = {"grid": index.grid, "in_channels": index.width, "num_classes": index.num_classes, **more}
    for name, value in found.items():
        if f"model.{name}" in asked and getattr(model, name) != value:
            raise MismatchError(
                f"model.{name} is {getattr(model, name)}, {index.url} holds {value}: leave it out, it comes from the "
                "shards"
            )
    if config.normalise == "auto":
        config = dataclasses.replace(config, normalise=chosen_normalisation(index))
    return dataclasses.replace(config, model=dataclasses.replace(model, **found))  # type: ignore[call-arg]


def compiled(objective: Objective, or_eager: bool = False) -> Objective:
    """Compile `objective` into one graph, including forward-mode derivatives, once for every shape.

    If this machine cannot compile, a call raises TrainerError, or with `or_eager` says so once and runs as it is.
    """
    from torch._dynamo.exc import TorchDynamoException  # loading it takes as long as torch itself

    fast = torch.compile(objective, fullgraph=True, dynamic=False)

    def call(*inputs: Any, **named: Any) -> dict[str, Tensor]:
        nonlocal fast
        try:
            return fast(*inputs, **named)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            if not or_eager:
                raise TrainerError(f"compile: {reason}; train with --set compile=false") from error
            print(f"training is not compiled, and slower: {reason}", file=sys.stderr)
            fast = objective
            return objective(*inputs, **named)

    return call
