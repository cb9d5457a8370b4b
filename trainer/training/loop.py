"""The training loop: steps over ranks and micro-batches, logs, checkpoints, stopping and resuming.

Gradients of a step are summed explicitly over micro-batches and ranks, so every part of a loss is scaled to the global
batch before `backward`. All ranks stop at the same step, after a checkpoint.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import InterruptedRunError, MismatchError, NonFiniteLossError, UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.places.exclusion import still_ours
from hierarchy_builder.terminal import counted
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.reader import classes_with_images
from trainer.data.shards import ShardIndex
from trainer.data.stream import StreamPlan, batch_loader
from trainer.training import checkpoint as saved
from trainer.training.distributed import GradientSum, World, check_equal
from trainer.training.log import RunLog, open_trackers
from trainer.training.mirror import named, send
from trainer.training.run_folder import locked, prepare_folder
from trainer.training.speed import explained, peak_of
from trainer.training.weights import WeightAverages, fill

SHOWN_KEYS = 8
"""Largest number of sample keys listed in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """State of a run when it ended."""

    run: str
    step: int
    images_seen: int
    seconds: float
    """Training time, including the time before each resumption."""
    loss: float | None
    """Loss in the last line of metrics.jsonl."""
    checkpoint: str


CTRL_C, OTHER_STOP = "Ctrl-C", "a signal or the wall clock"


@dataclass(slots=True)
class StopRequest:
    """The number of the signal that asks the run to stop; 0 for none."""

    signal: int = 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into a request to stop at the end of the step.

    Python handles signals only in the main thread; in other threads the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: object) -> None:
        request.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Choose inside the block how a GPU multiplies what stays float32; the setting of the process comes back after it.

    A run of bfloat16 takes TF32 products there, as JAX and so the release do.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_sets(index: ShardIndex, world: World) -> None:
    """Raise UsageError for sets of several splits, and MismatchError unless every process reads the same shards."""
    first, *others = index.parts
    for other in others:
        if other.split != first.split:
            raise UsageError(
                f"{first.url} is of split {first.split!r} and {other.url} of {other.split!r}: train on sets of one "
                "split, and let the others judge the run (`trainer report RUN`, `trainer evaluate`)"
            )
    digests = world.gather(torch.tensor(list(bytes.fromhex(index.digest)), device=world.device))
    if differing := (digests != digests[0]).any(dim=1).nonzero().flatten().tolist():
        raise MismatchError(
            f"this process reads {index.url} ({counted(index.num_samples, 'sample')}), and the shards of rank "
            f"{differing[0]} are not those of rank 0: name the same sets in every process, and let patterns match the "
            "same folders on every machine"
        )


class Loop(ABC):
    """One run in one process: the state that checkpoints store, and the loop over steps.

    A subclass sets `plan`, `dataset`, `model`, `optimizer` and `averages`, calls `_begin`, and implements the step
    (`backward`), its learning rate (`_rate`), the sheet of samples (`_sheet`) and the report on epochs (`_audit`).
    """

    terms: tuple[str, ...]
    """Names of the terms that `backward` returns, each a mean over the global batch; one of them is `loss`."""
    shown: tuple[str, ...] = ("raw_mse_u",)
    """Terms shown on stderr, those that fall as training proceeds; the adaptive loss stays near 2 by design."""
    rate_field: str = "optim.lr"
    """Name of the learning rate in the configuration."""
    plan: StreamPlan
    dataset: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: WeightAverages
    normaliser: Normaliser = RAW
    flops_per_image: float | None = None
    """Operations of a step for each image; None where they were not counted."""
    one_backward_pass = False
    """Whether `backward` makes each gradient once, so that ranks may begin to add them up while it runs."""

    def __init__(
        self, config: Any, index: ShardIndex, out: Path, world: World, stop: StopRequest, quiet: bool
    ) -> None:
        check_sets(index, world)
        self.config, self.index, self.out, self.world, self.stop = config, index, out, world, stop
        self.quiet = quiet
        self.step = 0
        self.seconds = 0.0
        self.loss: float | None = None
        self.sums: dict[str, float] = {}
        self.classes: list[int] = []
        """The classes that have images, which the main rank knows; only they are drawn."""

    def _begin(self, origin: Path | None) -> None:
        """Restore the checkpoint `origin`, if there is one, and prepare the run folder."""
        if origin is not None:
            self._restore(origin)
            if self.world.is_main and not self.quiet:
                seen, total = self.images_seen, self.config.total_images
                print(
                    f"goes on from {named(origin)}: step {self.step:,}, {seen:,} of {total:,} images",
                    file=sys.stderr,
                )
        self.world.barrier()  # all ranks must have read the folder before the main rank changes it
        if self.world.is_main:
            self.classes = self._classes(origin)
            with locked(self.out):
                prepare_folder(self.out, self.config, self.index, self.step)
        self.world.barrier()

    def _classes(self, origin: Path | None) -> list[int]:
        """Return the classes with images, which the checkpoint `origin` knows, or else the labels in the shards.

        Labels in shards that lie elsewhere are not read, as that would download every shard: all classes are taken.
        """
        index = self.index
        before = saved.load_state(origin).shards if origin else {}
        if before.get("classes") and before["config_hash"] == index.config_hash:
            return list(before["classes"])
        if index.is_remote:
            return list(range(index.num_classes))
        return classes_with_images(index, max_damaged=self.config.max_damaged_shards)

    @abstractmethod
    def backward(self, batch: Any, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; return their share of each of `terms`."""

    @abstractmethod
    def _rate(self) -> float:
        """Return the learning rate of the next update."""

    @abstractmethod
    def _sheet(self) -> Image.Image:
        """Draw a picture of samples from the current model."""

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> dict[str, float]:
        """Replace every gradient by its sum over all ranks; return further figures of the step, alike on all ranks."""
        self.gradient_sum.finish()
        return {}

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds beside weights and optimiser: tensors by name, by file name."""
        return {}

    def _audit(self) -> dict[str, Any]:
        """Return the report on finished epochs, written at the end of each; the base class lists skipped shards."""
        damaged = self.dataset.damaged_shards()
        return {"damaged_shards": damaged} if damaged else {}

    def _stream_plan(self, shard_sizes: tuple[int, ...] | None = None, **fields: Any) -> StreamPlan:
        """Return the configured order of samples; shard_sizes: samples of each shard to train on, None for all."""
        return StreamPlan(
            shard_sizes=shard_sizes or tuple(shard.num_samples for shard in self.index.shards),
            num_levels=self.index.num_levels,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle_shards=self.config.shuffle_shards,
            **fields,
        )

    def _averaged(self) -> AbstractContextManager[object]:
        """Return a context in which the model has its first weight average, if there is one."""
        halflives = list(self.averages.averages)
        return self.averages.lent_to(self.model, halflives[0]) if halflives else nullcontext()

    def _micro_batch(self, batch: Any) -> int:
        """Return the number of images in one backward pass."""
        return min(self.config.micro_batch_size or len(batch), len(batch))

    @property
    def images_seen(self) -> int:
        return self.step * self.config.batch_size

    def train(self) -> RunSummary:
        """Take the remaining steps; write checkpoints at intervals, at the end and when asked to stop."""
        config = self.config
        batches = range(self.step, -(-config.total_images // config.batch_size))
        loader = batch_loader(
            self.dataset, batches, config.loader_workers, pin_memory=self.world.device.type == "cuda"
        )
        folder = saved.latest_checkpoint(self.out)
        lock = locked(self.out) if self.world.is_main else nullcontext()
        with lock, float32_products(self.world.device, config.precision), self._opened_log() as log:
            began = now = time.monotonic()
            for batch in loader:
                time_is_up = time.monotonic() - began > (config.max_seconds or math.inf)
                with explained(lambda batch=batch: self._micro_batch(batch)):  # type: ignore[misc]
                    terms, stopped = self.take_step(batch, time_is_up)
                elapsed, now = time.monotonic() - now, time.monotonic()
                self.seconds += elapsed
                is_last = self.step == batches.stop
                self._note(log, {**terms, "seconds": elapsed}, is_last)
                if stopped or is_last or self._crosses(config.checkpoint_images):
                    folder = self._save()
                if stopped and not is_last:
                    self._end(stopped)
        return RunSummary(
            run=str(named(self.out)),
            step=self.step,
            images_seen=self.images_seen,
            seconds=round(self.seconds, 3),
            loss=self.loss,
            checkpoint=str(folder and named(folder)),
        )

    def _opened_log(self) -> AbstractContextManager[RunLog | None]:
        if not self.world.is_main:
            return nullcontext()
        out, seen, quiet = self.out, self.images_seen, self.quiet
        trackers = open_trackers(out, seen, self.config, quiet)
        return RunLog(out, self.config.total_images, seen, quiet, trackers, self.shown)

    def take_step(self, batch: Any, time_is_up: bool) -> tuple[dict[str, float], str]:
        """Take one optimiser step. Returns its terms and, if any rank wants to stop, the reason, else ""."""
        world, share, micro = self.world, len(batch), self._micro_batch(batch)
        sums = torch.zeros(len(self.terms) + 3, dtype=torch.float64, device=world.device)
        self.optimizer.zero_grad(set_to_none=True)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.gradient_sum = GradientSum(world, parameters)
        for start in range(0, share, micro):
            stop = min(start + micro, share)
            overlaps = self.one_backward_pass and stop == share
            with self.gradient_sum.during() if overlaps else nullcontext():
                sums[: len(self.terms)] += self.backward(batch, start, stop)
        measured = self._sum_gradients(parameters)
        # Stop requests are gathered together with the losses, so that all ranks stop at the same step.
        sums[-3] = self.stop.signal == signal.SIGINT
        sums[-2] = time_is_up or self.stop.signal != 0
        sums[-1] = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        rows = world.gather(sums).cpu()
        *values, interrupted, stopped, _ = rows.sum(dim=0).tolist()
        terms = {**dict(zip(self.terms, values, strict=True)), "grad_norm": float(rows[0, -1]), **measured}
        if not rows.isfinite().all():
            self._refuse(batch, terms)
        check_equal(rows[:, -1], "the norm of the summed gradients")
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.averages.update(self.model, self.images_seen, self.config.batch_size)
        return terms, CTRL_C if interrupted else OTHER_STOP if stopped else ""

    def _note(self, log: RunLog | None, terms: dict[str, float], is_last: bool) -> None:
        """Add a step's terms to the running sums; write their means, and at the end of an epoch its report."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["steps"] = self.sums.get("steps", 0.0) + 1
        if self._crosses(self.config.log_images) or is_last:
            self._assert_equal_weights()
            steps, seconds = self.sums.pop("steps"), self.sums.pop("seconds")
            means = {name: total / steps for name, total in self.sums.items()}
            self.loss, self.sums = means["loss"], {}
            if log:
                still_ours(self.out)
                rate = steps * self.config.batch_size / seconds
                speed = {"images_per_second": rate, **self._utilisation(rate), "time": self.seconds}
                log.write({**self._position(), **means, **speed})
        if log and self.config.sample_images and self._crosses(self.config.sample_images):
            log.show_samples(self._sheet(), self.step, self.images_seen)
        if log and self._crosses(self.plan.num_samples):
            log.write({**self._position(), **self._audit()})
        if log:
            log.advance(self.images_seen)

    def _utilisation(self, rate: float) -> dict[str, float]:
        """Return `mfu`, the share of the devices' peak in bfloat16 at `rate` images per second, where it is known."""
        if self.flops_per_image is None or self.world.device.type != "cuda":
            return {}
        peak = peak_of(torch.cuda.get_device_name(self.world.device))
        return {"mfu": rate * self.flops_per_image / (peak * self.world.size)} if peak else {}

    def _position(self) -> dict[str, int]:
        epoch = self.images_seen // self.plan.num_samples
        return {"step": self.step, "images": self.images_seen, "epoch": epoch}

    def _crosses(self, every: int) -> bool:
        """Whether the last step reached or passed a multiple of `every` images."""
        return self.images_seen // every > (self.images_seen - self.config.batch_size) // every

    def _assert_equal_weights(self) -> None:
        weights = [p.detach() for p in self.model.parameters()]
        norms = self.world.gather(torch.nn.utils.get_total_norm(weights)[None])[:, 0]
        check_equal(norms, "the norm of the weights")

    def _refuse(self, batch: Any, terms: dict[str, float]) -> None:
        finite = batch.features.isfinite().flatten(1).all(dim=1).tolist()
        damaged = [key for key, is_fine in zip(batch.keys, finite, strict=True) if not is_fine]
        keys = damaged or batch.keys
        shown = ", ".join(keys[:SHOWN_KEYS]) + (
            f" and {len(keys) - SHOWN_KEYS} more" * (len(keys) > SHOWN_KEYS)
        )
        what = "features are not finite in" if damaged else "all features are finite; samples of this rank:"
        bad = ", ".join(f"{name} {value}" for name, value in terms.items() if not math.isfinite(value))
        raise NonFiniteLossError(
            f"step {self.step}, seed {self.config.seed}: {bad}; {what} {shown}. "
            f"Train into another folder with a lower {self.rate_field}, or on shards without these samples"
        )

    def _save(self) -> Path:
        self._assert_equal_weights()
        folder = saved.checkpoint_folder(self.out, self.step)
        if self.world.is_main:
            still_ours(self.out)
            state = saved.RunState(
                step=self.step,
                images_seen=self.images_seen,
                config=to_mapping(self.config),
                shards={**self.index.describe(), "classes": self.classes},
                seconds=self.seconds,
                loss=self.loss,
                log=self.sums,
            )
            averages = self.averages.state_dict()
            saved.save_checkpoint(
                folder, state, self.model, averages, self.optimizer, self.normaliser, self._kept()
            )
            saved.prune_checkpoints(self.out, self.config.keep_checkpoints)
            send(self.out)
        self.world.barrier()
        return folder

    def _restore(self, folder: Path) -> None:
        state = saved.load_state(folder)
        fill(self.model, folder, None)
        self.averages.load_state_dict({n: saved.load_weights(folder, n) for n in saved.averages_of(folder)})
        saved.restore_optimizer(self.optimizer, saved.load_tensors(folder / saved.OPTIMIZER), state.optimizer)
        self.step, self.seconds, self.loss, self.sums = state.step, state.seconds, state.loss, dict(state.log)

    def _end(self, reason: str) -> None:
        if reason == CTRL_C:
            raise KeyboardInterrupt
        raise InterruptedRunError(
            f"{self.out}: stopped by {reason} at step {self.step}, {self.images_seen} images, after a checkpoint; "
            "the same command continues"
        )
