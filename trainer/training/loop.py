"""The training loop: steps over ranks and micro-batches, logs, checkpoints, stopping and resuming.

Gradients of a step are summed explicitly over micro-batches and ranks, so every part of a loss is scaled to the global
batch before `backward`. All ranks stop at the same step, after a checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hierarchy_builder.errors import InterruptedRunError, NonFiniteLossError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.exclusion import still_ours
from hierarchy_builder.terminal import say
from trainer.data.normalisation import Normaliser, check_describes, normaliser_of
from trainer.data.reader import LOOKED_AT, Rows, ShardReader, classes_with_images, looked_at
from trainer.data.shards import ShardIndex
from trainer.data.stream import BatchDataset, StreamPlan, batch_loader
from trainer.training import checkpoint as saved
from trainer.training.distributed import GradientSum, World, check_equal
from trainer.training.log import RunLog
from trainer.training.mirror import named, send
from trainer.training.optim import optimizer_of
from trainer.training.run_folder import (
    check_same_run,
    check_sets,
    find_origin,
    locked,
    prepare_folder,
    settled,
)
from trainer.training.speed import counted_flops, explained, float32_products, images_that_fit, peak_of
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


class Loop(ABC):
    """One run of a network in one process: the state that checkpoints store, and the loop over steps.

    A subclass builds the network (`_network`), and implements the step (`backward`) and its learning rate (`_rate`).
    """

    pipeline: Any
    """Class of the method's pipeline; its `sheet()` draws the samples shown during training."""
    terms: tuple[str, ...]
    """Names of the terms that `backward` returns, each a mean over the global batch; one of them is `loss`."""
    shown: tuple[str, ...] = ("raw_mse_u",)
    """Terms shown on stderr, those that fall as training proceeds; the adaptive loss stays near 2 by design."""
    rate_field: str = "optim.lr"
    """Name of the learning rate in the configuration."""
    flops_per_image: float | None = None
    """Operations of a step for each image; None where they were not counted."""
    fitting: int | None = None
    """Images in one backward pass as they were chosen for the memory of the device."""
    is_alike_in_parts = True
    """Whether a batch gives the same gradient whatever its parts, so that one may be chosen by memory."""
    one_backward_pass = False
    """Whether `backward` makes each gradient once, so that ranks may begin to add them up while it runs."""

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
        check_sets(index, world)
        self.config, self.index, self.out, self.world, self.stop = config, index, out, world, stop
        self.quiet = quiet
        self.step = 0
        self.seconds = 0.0
        self.loss: float | None = None
        self.sums: dict[str, float] = {}
        self.classes: list[int] = []
        """The classes that have images, which the main rank knows; only they are drawn. A checkpoint holds them."""
        self.plan = self._plan()
        self.dataset = self._dataset()
        self.origin = origin = find_origin(out, resume, world.is_main)
        self.config = config = settled(config, out, origin, world.device)
        check_same_run(out, origin, config, index)
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

    @abstractmethod
    def backward(self, batch: Any, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; return their share of each of `terms`."""

    @abstractmethod
    def _rate(self) -> float:
        """Return the learning rate of the next update."""

    @abstractmethod
    def _network(self) -> nn.Module:
        """Build the initial network; torch's global generator is seeded with the seed of the run."""

    def _plan(self) -> StreamPlan:
        """Return the order in which samples are read."""
        return self._stream_plan()

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

    def _dataset(self) -> Any:
        """Open the shards as batches. Raises TrainerError if they lack data that the method needs."""
        config, world = self.config, self.world
        return BatchDataset(
            self.index, self.plan, world.rank, world.size, config.verify_shards, config.max_damaged_shards
        )

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        """Return the normaliser of the checkpoint `origin`, or without one that of the configuration.

        Raises MismatchError if the statistics of a set do not describe its samples.
        """
        if origin:
            return saved.load_normaliser(origin)
        kind = self.config.normalise
        for part, numbers in looked_at(self.index) if kind != "none" else ():
            (rows,) = self._samples(numbers)
            check_describes(normaliser_of(kind, part), rows.raw_features(), part)
        return normaliser_of(kind, self.index)

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

    def _begin(self, origin: Path | None) -> None:
        """Restore the checkpoint `origin`, if there is one, and prepare the run folder."""
        if origin is not None:
            self._restore(origin)
            seen, total = self.images_seen, self.config.total_images
            say(
                f"goes on from {named(origin)}: step {self.step:,}, {seen:,} of {total:,} images",
                quiet=self.quiet or not self.world.is_main,
            )
        self.world.barrier()  # all ranks must have read the folder before the main rank changes it
        if self.world.is_main:
            if not self.classes and self.index.is_remote:  # to read labels would download every shard
                self.classes = list(range(self.index.num_classes))
            elif not self.classes:
                self.classes = classes_with_images(self.index, max_damaged=self.config.max_damaged_shards)
            with locked(self.out):
                prepare_folder(self.out, self.config, self.index, self.step)
        self.world.barrier()

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

    def _sheet(self) -> Image.Image:
        """Draw a picture of samples from the current model, with its first weight average if there is one."""
        average = next(iter(self.averages.averages), None)
        with nullcontext() if average is None else self.averages.lent_to(self.model, average):
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

    def _micro_batch(self, batch: Any) -> int:
        """Return the number of images in one backward pass."""
        return min(self.config.micro_batch_size or self.fitting or len(batch), len(batch))

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
        with ExitStack() as held:
            log = None
            if self.world.is_main:
                held.enter_context(locked(self.out))
                log = RunLog(self.out, config, self.images_seen, self.quiet, self.shown)
                held.callback(log.close)
            held.enter_context(float32_products(self.world.device, config.precision))
            began = now = time.monotonic()
            for batch in loader:
                time_is_up = time.monotonic() - began > (config.max_seconds or math.inf)
                with explained(partial(self._micro_batch, batch)):
                    terms, stopped = self.take_step(batch, time_is_up)
                elapsed, now = time.monotonic() - now, time.monotonic()
                self.seconds += elapsed
                is_last = self.step == batches.stop
                self._note(log, {**terms, "seconds": elapsed}, is_last)
                if stopped or is_last or self._crosses(config.checkpoint_images):
                    folder = self._save()
                if stopped == CTRL_C and not is_last:
                    raise KeyboardInterrupt
                if stopped and not is_last:
                    raise InterruptedRunError(
                        f"{self.out}: stopped by {stopped} at step {self.step}, {self.images_seen} images, after a "
                        "checkpoint; the same command continues"
                    )
        return RunSummary(
            run=str(named(self.out)),
            step=self.step,
            images_seen=self.images_seen,
            seconds=round(self.seconds, 3),
            loss=self.loss,
            checkpoint=str(folder and named(folder)),
        )

    def take_step(self, batch: Any, time_is_up: bool) -> tuple[dict[str, float], str]:
        """Take one optimiser step. Returns its terms and, if any rank wants to stop, the reason, else ""."""
        if self.world.device.type == "cuda" and self.flops_per_image is None:
            self._look_at_cost(batch)
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
        if state.shards["config_hash"] == self.index.config_hash:
            self.classes = list(state.shards.get("classes") or [])
