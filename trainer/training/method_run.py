"""Training of a method: the base class of every method's run, whose loss is a sum over samples.

A method subclasses `MethodRun` and defines which data it reads, which network it trains, what it draws for a step, and
how its terms are combined into a loss. Post-training, whose loss is of a whole batch, subclasses `Loop`.

The random numbers of a step depend only on (seed, step, row of the global batch), and each rank takes its rows. Every
part of the loss is scaled to the global batch before `backward`, so gradients are summed, not averaged, over
micro-batches and ranks: any split of the batch takes the same steps.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.terminal import counted, say
from trainer.data.normalisation import chosen_normalisation
from trainer.data.shards import ShardIndex
from trainer.seeds import StepRows
from trainer.training.config import MethodRunConfig
from trainer.training.distributed import joined_world
from trainer.training.loop import Loop, RunSummary, stop_signals
from trainer.training.schedules import learning_rate

Objective = Callable[..., dict[str, Tensor]]
ConfigT = TypeVar("ConfigT", bound=MethodRunConfig)


class MethodRun(Loop):
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
        can_gain = self.world.device.type == "cuda" and not config.activation_checkpointing
        by_default = config.compile is None and can_gain
        return compiled(loss, or_eager=by_default) if config.compile or by_default else loss

    @abstractmethod
    def _terms(self, part: Any, rows: StepRows) -> dict[str, Tensor]:
        """Compute the loss terms of `part`, which holds the rows `rows` of the global batch."""

    def _network(self) -> Any:
        return self.pipeline.network_type(self.config.model)

    def _rate(self) -> float:
        """The configured rate, constant until the cooldown."""
        config, optim = self.config, self.config.optim
        return learning_rate(self.images_seen, config.total_images, optim.lr, optim.cooldown_fraction)

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
        rows = StepRows(
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            step=self.step,
            rows=slice(first + start, first + stop),
            device=device,
        )
        terms = self._scaled(self._terms(part, rows), part)
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
            say(f"training is not compiled, and slower: {reason}")
            fast = objective
            return objective(*inputs, **named)

    return call
