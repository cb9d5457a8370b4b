"""Training: batches in, checkpoints and metrics.jsonl out; stops at any step and goes on bit for bit.

A step's batch, levels, times and noise are functions of (seed, step) for the whole global batch, and each rank
takes its rows. Every part of the loss is scaled to the global batch before `backward`, so that gradients are
summed, not averaged, over micro-batches and ranks and any split of the batch takes the same steps.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer import checkpoint as saved
from trainer.config import TrainConfig, to_mapping
from trainer.distributed import World, joined_world
from trainer.ema import WeightAverages
from trainer.errors import InterruptedRunError, NonFiniteLossError
from trainer.log import RunLog
from trainer.methods import trajectory_forcing
from trainer.model import TrajectoryTransformer
from trainer.optim import MuonAdam
from trainer.run_folder import check_same_run, find_origin, prepare_folder
from trainer.schedules import learning_rate
from trainer.shards import ShardIndex, open_index
from trainer.stream import Batch, BatchDataset, StreamPlan, batch_loader

TERMS = ("loss", "region", "loss_u", "loss_v", "raw_mse_u", "raw_mse_v")
"""What a step reports: the loss and its parts, each a mean over the global batch."""
CTRL_C, OTHER_STOP = "Ctrl-C", "a signal or the wall clock"
SHOWN_KEYS = 8
"""Sample keys named in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """How a run ended."""

    run: str
    step: int
    images_seen: int
    seconds: float
    """Time spent training, over all resumptions."""
    loss: float | None
    """Loss in the last line of metrics.jsonl."""
    checkpoint: str


def train(
    config: TrainConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False
) -> RunSummary:
    """Train on the shards at `shards` until `total_images`, in the run folder `out`.

    resume: `auto` goes on from the newest checkpoint of `out` if there is one, `never` asks for a fresh folder,
    else a run or checkpoint folder to start from. Grid, channels, classes and levels come from the shards.
    Raises MismatchError when `out` was made with another configuration or other shards, InterruptedRunError
    after a checkpoint on SIGTERM, SIGUSR1 or `max_seconds`, KeyboardInterrupt after one on Ctrl-C, and
    NonFiniteLossError when the loss or a gradient is not finite.
    """
    index = open_index(shards)
    config = fit_to_shards(config, index)
    with joined_world() as world, stop_signals() as stop:
        return _Run(config, index, Path(out), resume, world, stop, quiet).train()


def fit_to_shards(config: TrainConfig, index: ShardIndex) -> TrainConfig:
    """The config with the model's grid, channels, classes and levels as the shards have them."""
    model = dataclasses.replace(
        config.model,
        grid=index.grid,
        in_channels=index.width,
        num_classes=index.num_classes,
        num_levels=index.num_levels,
    )
    return dataclasses.replace(config, model=model)


@dataclass(slots=True)
class StopRequest:
    """Which signal asked the run to stop, if any."""

    signal: int = 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into a request to stop at the end of the step."""
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


class _Run:
    """One run in one process: the state that checkpoints keep, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        index: ShardIndex,
        out: Path,
        resume: str,
        world: World,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        self.config, self.index, self.out, self.world, self.stop = config, index, out, world, stop
        self.quiet = quiet
        self.plan = StreamPlan(
            shard_sizes=tuple(shard.num_samples for shard in index.shards),
            num_levels=index.num_levels,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle_shards=config.shuffle_shards,
            level_per=config.level_per,
        )
        self.dataset = BatchDataset(index, self.plan, world.rank, world.size, config.verify_shards)
        origin = find_origin(out, resume)
        check_same_run(out, origin, config, index)
        self.model = _fresh_model(config).to(world.device)
        self.optimizer = MuonAdam(self.model.named_parameters(), config.optim)
        self.averages = WeightAverages(self.model, config.optim.ema_halflives_kimg, config.optim.ema_ramp)
        self.step = 0
        self.seconds = 0.0
        self.loss: float | None = None
        self.sums: dict[str, float] = {}
        self.counts: np.ndarray | None = None
        self.counted = 0
        if origin is not None:
            self._restore(origin)
        if world.is_main:
            prepare_folder(out, config, index, self.step)
        world.barrier()

    @property
    def images_seen(self) -> int:
        return self.step * self.config.batch_size

    def train(self) -> RunSummary:
        """Take the remaining steps; checkpoints on the way, at the end and when asked to stop."""
        config = self.config
        batches = range(self.step, -(-config.total_images // config.batch_size))
        loader = batch_loader(
            self.dataset, batches, config.loader_workers, pin_memory=self.world.device.type == "cuda"
        )
        folder = saved.latest_checkpoint(self.out)
        with self._opened_log() as log:
            began = now = time.monotonic()
            for batch in loader:
                time_is_up = time.monotonic() - began > (config.max_seconds or math.inf)
                terms, stopped = self._take_step(batch, time_is_up)
                elapsed, now = time.monotonic() - now, time.monotonic()
                self.seconds += elapsed
                is_last = self.step == batches.stop
                self._note(log, {**terms, "seconds": elapsed}, is_last)
                if stopped or is_last or self._crosses(config.checkpoint_images):
                    folder = self._save()
                if stopped and not is_last:
                    self._end(stopped)
        return RunSummary(
            run=str(self.out),
            step=self.step,
            images_seen=self.images_seen,
            seconds=round(self.seconds, 3),
            loss=self.loss,
            checkpoint=str(folder),
        )

    def _opened_log(self) -> AbstractContextManager[RunLog | None]:
        if not self.world.is_main:
            return nullcontext()
        return RunLog(self.out, self.config.total_images, self.images_seen, self.quiet)

    def _take_step(self, batch: Batch, time_is_up: bool) -> tuple[dict[str, float], str]:
        """One optimiser step. Returns its terms, and why all ranks are to stop now, if any of them is."""
        world, share = self.world, len(batch)
        micro = self.config.micro_batch_size or share
        sums = torch.zeros(len(TERMS) + 2, dtype=torch.float64, device=world.device)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, share, micro):
            sums[: len(TERMS)] += self._backward(batch, start, min(start + micro, share))
        sums[-2] = self.stop.signal == signal.SIGINT
        sums[-1] = time_is_up or self.stop.signal != 0
        parameters = list(self.model.parameters())
        world.add_gradients(parameters)
        # The wish to stop travels with the losses, so that all ranks stop at the same step.
        *values, interrupted, stopped = world.add(sums).tolist()
        terms = dict(zip(TERMS, values, strict=True))
        terms["grad_norm"] = float(
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        )
        if not all(math.isfinite(value) for value in terms.values()):
            self._refuse(batch, terms)
        self._set_learning_rate()
        self.optimizer.step()
        self.step += 1
        self.averages.update(self.model, self.images_seen, self.config.batch_size)
        return terms, CTRL_C if interrupted else OTHER_STOP if stopped else ""

    def _set_learning_rate(self) -> None:
        config, optim = self.config, self.config.optim
        rate = learning_rate(self.images_seen, config.total_images, optim.lr, optim.cooldown_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _backward(self, batch: Batch, start: int, stop: int) -> Tensor:
        """Add the gradients of rows `start` ≤ i < `stop` of this rank; returns their part of each of TERMS."""
        config, device = self.config, self.world.device
        first = self.world.rank * len(batch)
        part = batch.rows(start, stop).to(device)
        x, prev, regions = part.targets()
        draws = trajectory_forcing.draw_batch(
            config.batch_size,
            x.shape[1:],
            config.method,
            seed=config.seed,
            step=self.step,
            rows=slice(first + start, first + stop),
            device=device,
        )
        label = part.label
        if config.model.guidance:
            label = torch.where(draws.drop_label, config.model.num_classes, label)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            terms = trajectory_forcing.loss(
                self.model,
                x,
                prev=prev,
                level=part.level,
                label=label,
                regions=regions,
                t=draws.t,
                r=draws.r,
                noise=draws.noise,
                guidance=draws.guidance if config.model.guidance else None,
                region_weight=config.method.region_weight,
            )
        # The region term is a mean over the samples that have regions, the others over all samples.
        share = len(part) / config.batch_size
        region = terms["region"] * (
            (part.level < config.model.num_levels - 1).sum() / self._num_with_regions()
        )
        loss = (terms["loss_u"] + terms["loss_v"]) * share + config.method.region_weight * region
        loss.backward()
        means = (terms[name] * share for name in ("loss_u", "loss_v", "raw_mse_u", "raw_mse_v"))
        return torch.stack([loss, region, *means]).detach().double()

    def _num_with_regions(self) -> int:
        """Samples of the current global batch whose level has regions (the last has none), at least 1."""
        _, levels = self.plan.places(self.images_seen, self.images_seen + self.config.batch_size)
        return max(1, int((levels < self.config.model.num_levels - 1).sum()))

    def _note(self, log: RunLog | None, terms: dict[str, float], is_last: bool) -> None:
        """Add a step's terms to the running sums; write their means, and at the end of an epoch its audit."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["steps"] = self.sums.get("steps", 0.0) + 1
        if self._crosses(self.config.log_images) or is_last:
            self._assert_equal_weights()
            steps, seconds = self.sums.pop("steps"), self.sums.pop("seconds")
            means = {name: total / steps for name, total in self.sums.items()}
            self.loss, self.sums = means["loss"], {}
            if log:
                rate = steps * self.config.batch_size / seconds
                log.write({**self._position(), **means, "images_per_second": rate, "time": self.seconds})
        if log and self._crosses(self.plan.num_samples):
            log.write({**self._position(), "coverage": self._coverage()})
        if log:
            log.advance(self.images_seen)

    def _position(self) -> dict[str, int]:
        epoch = self.images_seen // self.plan.num_samples
        return {"step": self.step, "images": self.images_seen, "epoch": epoch}

    def _coverage(self) -> dict[str, list[int]]:
        """Audit of all finished epochs: images per level, and samples by the number of levels they met."""
        boundary = self.images_seen // self.plan.num_samples * self.plan.num_samples
        if self.counts is None:
            self.counts, self.counted = self.plan.level_counts(0, boundary), boundary
        self.counts += self.plan.level_counts(self.counted, boundary)
        self.counted = boundary
        met = (self.counts > 0).sum(axis=1)
        return {
            "images_per_level": self.counts.sum(axis=0).tolist(),
            "samples_by_levels_met": np.bincount(met, minlength=self.plan.num_levels + 1).tolist(),
        }

    def _crosses(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` images."""
        return self.images_seen // every > (self.images_seen - self.config.batch_size) // every

    def _assert_equal_weights(self) -> None:
        weights = [p.detach() for p in self.model.parameters()]
        self.world.assert_equal(torch.nn.utils.get_total_norm(weights), "the norm of the weights")

    def _refuse(self, batch: Batch, terms: dict[str, float]) -> None:
        finite = batch.features.isfinite().flatten(1).all(dim=1).tolist()
        damaged = [key for key, is_fine in zip(batch.keys, finite, strict=True) if not is_fine]
        keys = damaged or batch.keys
        shown = ", ".join(keys[:SHOWN_KEYS]) + (
            f" and {len(keys) - SHOWN_KEYS} more" * (len(keys) > SHOWN_KEYS)
        )
        what = "features not finite in" if damaged else "features finite; samples of this rank:"
        bad = ", ".join(f"{name} {value}" for name, value in terms.items() if not math.isfinite(value))
        raise NonFiniteLossError(
            f"step {self.step}, seed {self.config.seed}: {bad}; {what} {shown}. "
            "Train into another folder with a lower optim.lr, or on shards without the samples"
        )

    def _save(self) -> Path:
        self._assert_equal_weights()
        folder = saved.checkpoint_folder(self.out, self.step)
        if self.world.is_main:
            state = saved.RunState(
                step=self.step,
                images_seen=self.images_seen,
                config=to_mapping(self.config),
                shards=self.index.describe(),
                seconds=self.seconds,
                loss=self.loss,
                log=self.sums,
            )
            saved.save_checkpoint(folder, state, self.model, self.averages.state_dict(), self.optimizer)
            saved.prune_checkpoints(self.out, self.config.keep_checkpoints)
        self.world.barrier()
        return folder

    def _restore(self, folder: Path) -> None:
        state = saved.load_state(folder)
        self.model.load_state_dict(saved.load_weights(folder, None))
        self.averages.load_state_dict({n: saved.load_weights(folder, n) for n in saved.averages_of(folder)})
        saved.restore_optimizer(self.optimizer, saved.load_tensors(folder / saved.OPTIMIZER), state.optimizer)
        self.step, self.seconds, self.loss, self.sums = state.step, state.seconds, state.loss, dict(state.log)

    def _end(self, reason: str) -> None:
        if reason == CTRL_C:
            raise KeyboardInterrupt
        raise InterruptedRunError(
            f"{self.out}: stopped by {reason} at step {self.step}, {self.images_seen} images, after a checkpoint; "
            "the same command goes on"
        )


def _fresh_model(config: TrainConfig) -> TrajectoryTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TrajectoryTransformer(config.model)
