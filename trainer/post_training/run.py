"""`trainer post-train`: a trained run goes on, towards the statistics of real images instead of single ones.

    B images of a global batch, b of a part of it, L levels, H×W grid, C channels

A step draws B samples for labels as frequent as in the shards, describes them by every term (see `terms`), and moves
the network against the gradient of the distances. All samples of a batch share its moments, so a batch of several
parts is drawn twice: without a graph, part by part, for the moments; and with one, part by part, for the gradient,
which by then is known for each row. A part may have any size, and the gradient is exact; so a batch of 1024 fits one
GPU. A batch that is a single part is drawn once.

Everything else is that of `trainer train`: loop, ranks, checkpoints, weight averages, logs and sheets of samples.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, NonFiniteLossError, UsageError
from hierarchy_builder.fields import known_fields, nearest
from hierarchy_builder.machine.transfers import sent
from hierarchy_builder.terminal import say
from trainer.data.normalisation import Normaliser
from trainer.data.shards import ShardIndex, check_trained_on
from trainer.decode.rae import decoder_for
from trainer.methods import registry
from trainer.post_training.distance import Target
from trainer.post_training.judges import Judge, load_judges, parse_judges, statistics_of_shards
from trainer.post_training.levels import LevelMoments, Space, check_widths, moments_of_shards, spaces_of
from trainer.post_training.moments import Average, OnlineQueue, Queue, RunningMoments
from trainer.post_training.terms import ClassTerm, Describe, Term, WholeTerm
from trainer.seeds import mixed_seed, row_noise
from trainer.training import checkpoint as saved
from trainer.training.config import PostTrainingConfig, RuledOptimConfig, checked, with_settings
from trainer.training.distributed import GradientSum, World, joined_world
from trainer.training.loop import Loop, RunSummary, stop_signals
from trainer.training.optim import optimizer_of
from trainer.training.schedules import warmup_cosine
from trainer.training.speed import counted_flops
from trainer.training.weights import average_of

MOMENTS = "moments.safetensors"
"""File of the moments of the shards, in the run folder."""
MOST_IMAGES, LONGEST = 50_000, 0.999
"""Images drawn before the first step, and β, of the release; both are chosen smaller for fewer real images."""
FROM_THE_RUN = ("model", "method", "normalise", "level_per", "preset", "method_name", "post_training")
"""Fields, and sections of them, that the run that is post-trained decides."""
NORM_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The run that is post-trained: one of its checkpoints, and which weights of it."""

    folder: Path
    state: saved.RunState
    config: Any
    average: str | None
    """Half-life of the weight average; None for the raw weights."""

    @classmethod
    def of(cls, run: str | Path, ema: str | None = "auto") -> Start:
        """The newest checkpoint of a run, or a checkpoint. Raises UsageError for a method without a gradient."""
        folder, state = saved.read_checkpoint(run)
        method = registry.method_in(state.config, str(run))
        config = registry.config_of(state.config, str(folder))
        if reason := method.load("pipeline").no_gradient(config):
            raise UsageError(f"{run} is a run of {method.name}, which cannot be post-trained: {reason}")
        return cls(folder=folder, state=state, config=config, average=average_of(config, ema))

    def describe(self) -> str:
        """Step, weights and their checksum; without paths, so that folders can be moved."""
        file = saved.MODEL if self.average is None else f"ema-{self.average}.safetensors"
        checksum = self.state.checksums.get(file, "unknown")
        return f"step {self.state.step}, {self.average or 'raw'}, {checksum}"

    def check_fits(self, index: ShardIndex) -> None:
        """Raise MismatchError unless encoder, grid, width, levels and classes of the shards are those of the run."""
        trained = self.state.shards
        check_trained_on(index, self.config.model, trained["encoder"], f"the run {self.folder}")
        if trained.get("class_names", names := list(index.class_names)) != names:
            raise MismatchError(
                f"{index.url} has the classes {', '.join(names[:5])} …, the run {self.folder} was trained with others: "
                "give shards of the same classes"
            )


def resolved(start: Start, index: ShardIndex, settings: Mapping[str, Any]) -> Any:
    """The configuration of the post-training of `start`: that of its run, the release's pace, and `settings`.

    settings: fields by name, `optim.lr`, or those of `PostTrainingConfig`, with or without `post_training.`.
    Raises UsageError for unknown fields and for those that the run decides.
    """
    own = {field.name for field in dataclasses.fields(PostTrainingConfig)} - {"start"}
    asked = {name.removeprefix("post_training."): value for name, value in settings.items()}
    known = own | set(known_fields(type(start.config)))
    for name in sorted(asked.keys() - own):
        if name not in known:
            raise UsageError(f"unknown field {name!r}, {nearest(name, sorted(known))} (--dry-run lists all)")
        if name.partition(".")[0] in FROM_THE_RUN or (name.startswith("optim.") and name not in PACE):
            raise UsageError(f"{name} comes from the run that is post-trained: leave it out")
    start.check_fits(index)
    base = start.config
    pace = RELEASE_PACE if base.preset != registry.method_of(base).small_preset else SMALL_PACE
    given = {name: value for name, value in asked.items() if name not in own}
    config = with_settings(dataclasses.replace(base, post_training=None), {**pace, **given})
    post = checked(PostTrainingConfig, {n: v for n, v in asked.items() if n in own}, "post-training")
    images = post.queue_images or min(MOST_IMAGES, index.num_samples)
    beta = post.ema_beta
    if beta is None:
        beta = min(LONGEST, max(0.0, 1 - config.batch_size / images))
    post = dataclasses.replace(post, start=start.describe(), queue_images=images, ema_beta=beta)
    check_widths(post, config.model)
    parse_judges(post.judges)
    return dataclasses.replace(config, post_training=post)


PACE = ("optim.lr", "optim.ema_halflives_kimg", "optim.ema_ramp")
"""Fields of the optimiser that post-training has too; its rule is always AdamW."""


RELEASE_PACE: dict[str, Any] = {
    "total_images": 51_200_000,
    "batch_size": 512,
    "checkpoint_images": 3_200_000,
    "sample_images": 3_200_000,
    "optim.lr": 1e-6,
    "optim.ema_halflives_kimg": (500.0,),
}
"""100,000 steps of 512 images, as the release post-trains its smallest network."""
SMALL_PACE: dict[str, Any] = {
    "total_images": 6_400,
    "batch_size": 32,
    "checkpoint_images": 6_400,
    "sample_images": 6_400,
    "log_images": 640,
    "optim.lr": 1e-4,
    "optim.ema_halflives_kimg": (0.5,),
}
"""A few minutes of two CPU cores for a network of the smallest preset."""


def post_train(
    start: Start,
    config: Any,
    index: ShardIndex,
    out: str | Path,
    decoder: str | Path | None = None,
    resume: str = "auto",
    quiet: bool = False,
) -> RunSummary:
    """Post-train in the run folder `out`, which continues like any run.

    config: what `resolved` returns. decoder: folder of an RAE decoder, for judges and sheets of samples; by default
    that of the run, or its encoder's own. See `run_method` for resume and further errors.
    """
    with joined_world() as world, stop_signals() as stop:
        return PostTrainingRun(
            start, config, index, Path(out), resume, world, stop, quiet, decoder=decoder
        ).train()


class LabelDataset:
    """Item n is this rank's share of the labels of batch n, a function of (seed, n) alone."""

    num_bytes = 1

    def __init__(self, images: Tensor, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        """images: of each class, float64 [K]; labels are as frequent."""
        if batch_size % world_size:
            raise UsageError(f"batch_size {batch_size}, expected a multiple of the {world_size} processes")
        self._shares = (images / images.sum()).cpu().numpy()
        self._batch_size, self._seed = batch_size, seed
        each = batch_size // world_size
        self._own = slice(rank * each, (rank + 1) * each)

    def read(self, number: int, pin_memory: bool = False) -> Tensor:
        """Item `number`, int64 [b]."""
        return self.draw(number, self._batch_size)[self._own]

    def draw(self, number: int, count: int, stream: int = 0) -> Tensor:
        """`count` labels, int64; numbers of another stream are independent of these."""
        generator = np.random.default_rng([self._seed, stream, number])
        return torch.from_numpy(generator.choice(len(self._shares), size=count, p=self._shares))

    def damaged_shards(self) -> list[str]:
        """None: no shard is read during training."""
        return []


class PostTrainingRun(Loop):
    """One run of post-training in one process."""

    shown = ("distance",)

    def __init__(self, start: Start, config: Any, *others: Any, decoder: str | Path | None = None) -> None:
        self.start, self.post, self.given_decoder = start, config.post_training, decoder
        self.one_backward_pass = not self.post.balanced  # which scales gradients before they are added
        self.pipeline = registry.method_of(config).load("pipeline")
        self.spaces = spaces_of(self.post, config.model.num_levels)
        super().__init__(config, *others)

    def _begin(self, origin: Path | None) -> None:
        self.decoder: Any = decoder_for(
            self.start.folder, self.index.encoder, self.given_decoder, self.world.device
        )
        self.networks = self._clones() if self.post.balanced else [self.model] * self.config.model.num_levels
        self.judges = self._load_judges()
        self.terms_of_loss = list(self._make_terms())
        self.terms = ("loss", "distance", *(term.name for term in self.terms_of_loss))
        super()._begin(origin)
        if origin is None:
            self._warn_of_few_images()
            self._fill()

    def _network(self) -> nn.Module:
        network: nn.Module = self.pipeline._load_network(
            self.start.folder, self.start.config, self.start.average
        )
        return network

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        return saved.load_normaliser(origin or self.start.folder)

    def _dataset(self) -> LabelDataset:
        """Read the moments of the shards, or compute them in the first process group that needs them."""
        config, world = self.config, self.world
        path = self.out / MOMENTS
        world.barrier()
        if path.exists():
            self.moments = LevelMoments.load(path, self.spaces)
        else:
            normaliser = saved.load_normaliser(self.start.folder).to(world.device)
            self.moments = moments_of_shards(self.index, self.spaces, self.post, normaliser, world)
        return LabelDataset(self.moments.images, config.batch_size, config.seed, world.rank, world.size)

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.post.rule == "own":
            return super()._optimizer()
        adamw = RuledOptimConfig(lr=self.config.optim.lr, betas=self.post.betas)
        return optimizer_of(self.model, adamw)

    def _rate(self) -> float:
        config = self.config
        pace = (config.total_images, config.optim.lr, self.post.warmup_fraction)
        return warmup_cosine(self.images_seen, *pace, final=0.0)

    def _make_terms(self) -> Iterator[Term]:
        """The distances that the configuration asks for."""
        device, post, moments = self.world.device, self.post, self.moments
        for space in self.spaces:
            tokens = int(np.prod(self.config.model.grid)) if space.kind == "tokens" else 1
            for classes in post.classes:
                target = moments.target(space, classes).to(device)
                name = f"fd_{space.name}" + ("" if classes == "all" else f"_{classes}")
                means = moments.class_means(space).to(device) if classes == "within" else None
                describe = _level_description(space, post.pooled_grid, means)
                if classes == "each":
                    own: RunningMoments = Average(post.ema_beta, *target.mean.shape, device=device)
                    shares = (moments.images / moments.images.sum()).to(device)
                    yield ClassTerm(name, describe, target, own, shares)
                else:
                    yield WholeTerm(name, describe, target, self._statistics(target.width, tokens))
        for judge in self.judges:
            if judge.reference is None:
                numbers = range(self.index.num_samples)
                judge.reference = statistics_of_shards(judge, self.index, self._size_px(), numbers, device)
            mean, covariance = (torch.from_numpy(array) for array in judge.reference)
            target = Target.of(mean, covariance, f"reference statistics of {judge.name}").to(device)
            statistics = self._statistics(target.width, 1)
            yield WholeTerm(f"fd_{judge.name}", _picture_description(judge), target, statistics, judge.weight)

    def _load_judges(self) -> list[Judge]:
        """Raise UsageError for judges without a decoder that has a gradient."""
        post = self.post
        if post.judges and not isinstance(self.decoder, nn.Module):
            raise UsageError(
                f"judges look at pictures, and {self.start.folder} has no decoder with a gradient: give --decoder "
                "FOLDER"
            )
        if isinstance(self.decoder, nn.Module):
            self.decoder = self.decoder.to(self.world.device).requires_grad_(False)
        return load_judges(post.judges, post.judge_files, post.judge_references, self.world.device, True)

    def _size_px(self) -> tuple[int, int]:
        """(h, w) of decoded pictures."""
        model = self.config.model
        with torch.no_grad():
            blank = self.decoder(torch.zeros(1, *model.grid, model.in_channels, device=self.world.device))
        return blank.shape[2], blank.shape[3]

    def _statistics(self, width: int, rows_per_image: int) -> RunningMoments:
        post, device = self.post, self.world.device
        if post.statistics == "average":
            return Average(post.ema_beta, width, device=device)
        kind = Queue if post.statistics == "snapshot" else OnlineQueue
        return kind(post.queue_images * rows_per_image, width, device)

    def _warn_of_few_images(self) -> None:
        images = self.post.queue_images
        for term in self.terms_of_loss:
            kept = images * (int(np.prod(self.config.model.grid)) if "tokens" in term.name else 1)
            if kept < term.target.width and self.world.is_main:
                say(
                    f"warning: {term.name}: {images} images begin statistics of {term.target.width} numbers, so their "
                    f"covariance has rank {kept - 1} at most; set queue_images={term.target.width + 1} or more",
                    self.quiet,
                )

    def _fill(self) -> None:
        """Draw `queue_images` samples and begin the statistics of every term with them."""
        count, size = self.post.queue_images, self.config.micro_batch_size or self.config.batch_size
        world, needs_rows = self.world, self.post.statistics != "average"
        labels = self.dataset.draw(0, count, stream=1)
        for number, first in enumerate(range(0, count, size)):
            # A queue keeps rows in order, so each process draws all of them; sums are shared between processes.
            if needs_rows or number % world.size == world.rank:
                label = labels[first : first + size].to(world.device)
                rows = range(first, first + len(label))
                with torch.no_grad():
                    noise = self._noise(rows, mixed_seed(self.config.seed, 1), 0)
                    self._add(self._rows(label, noise, clamp=True), label)
        for term in self.terms_of_loss:
            term.begin(World(device=world.device) if needs_rows else world)

    def _noise(self, rows: range, seed: int, step: int) -> Tensor:
        """float32 [noises, b, H, W, C]"""
        model = self.config.model
        shape = (self.pipeline.noises_of(self.model), *model.grid, model.in_channels)
        (noise,) = row_noise([shape], rows, seed=seed, step=step, device=self.world.device)
        return noise.transpose(0, 1)

    def _drawn(self, label: Tensor, noise: Tensor) -> Tensor:
        """Canvases float32 [b, L, H, W, C] in units of the network."""
        with self._autocast():
            canvases: Tensor = self.pipeline.draw(
                self.networks, self.config.method, label, noise, self.post.per_level
            )
        return canvases.float()

    def _rows(self, label: Tensor, noise: Tensor, clamp: bool = False) -> list[Tensor]:
        """Draw samples, and describe them by every term: rows [b, n, D].

        clamp: whether decoded pictures are clamped to [0, 1], as they are before the first step alone.
        """
        canvases, pictures = self._drawn(label, noise), None
        if self.judges:
            pictures = self.decoder(self.normaliser.undo(canvases[:, -1]))
            pictures = pictures.clamp(0, 1) if clamp else pictures
        return [term.describe(canvases, label, pictures) for term in self.terms_of_loss]

    def _add(self, rows: list[Tensor], label: Tensor) -> None:
        for term, own in zip(self.terms_of_loss, rows, strict=True):
            term.add(own, label)

    def _compare(self, batch: Tensor) -> list[Tensor] | None:
        """Compare the whole batch of all ranks with the targets.

        Returns the rows of the batch with their graph if it is a single part; otherwise each part is drawn again.
        """
        size = self._micro_batch(batch)
        rows: list[Tensor] | None = None
        for start in range(0, len(batch), size):
            label, noise = self._part(batch, start, min(start + size, len(batch)))
            with torch.set_grad_enabled(size >= len(batch)):
                rows = self._rows(label, noise)
            self._add(rows, label)
        for term in self.terms_of_loss:
            term.compare(self.world, self.post.floor)
        return rows if size >= len(batch) else None

    def _part(self, batch: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        first = self.world.rank * len(batch)
        noise = self._noise(range(first + start, first + stop), self.config.seed, self.step)
        return sent(batch[start:stop], self.world.device), noise

    def _look_at_cost(self, batch: Tensor) -> None:
        """Counts what is drawn without a graph too; decompositions and products with their results are left out."""
        super()._look_at_cost(batch)
        if self._micro_batch(batch) < len(batch):
            with torch.no_grad():
                again = counted_flops(lambda: self._rows(*self._part(batch, 0, 1)))
            self.flops_per_image = (self.flops_per_image or 0) + again

    def _trial(self, batch: Tensor, images: int) -> None:
        """Leaves the statistics as they are: the gradient is that of other numbers."""
        rows = self._rows(*self._part(batch, 0, images))
        torch.stack([each.sum() for each in rows]).sum().backward()
        for network in self.networks:
            network.zero_grad(set_to_none=True)

    def backward(self, batch: Any, start: int, stop: int) -> Tensor:
        drawn = self._compare(batch) if start == 0 else None
        label, noise = self._part(batch, start, stop)
        rows = drawn or self._rows(label, noise)
        parts = [term.surrogate(own, label) for term, own in zip(self.terms_of_loss, rows, strict=True)]
        torch.stack(parts).sum().backward()
        share = (stop - start) / self.config.batch_size
        values = {term.name: term.value for term in self.terms_of_loss}
        weighted = torch.stack([term.weight * term.value for term in self.terms_of_loss])
        shares = [term.weight * term.value / (term.value + self.post.floor) for term in self.terms_of_loss]
        values |= {"distance": weighted.sum(), "loss": torch.stack(shares).sum()}
        return share * torch.stack([values[name] for name in self.terms])

    def _clones(self) -> list[nn.Module]:
        """One network for each level; they share the weights and have gradients of their own."""
        clones = [copy.deepcopy(self.model) for _ in range(self.config.model.num_levels)]
        for clone in clones:
            for own, shared in zip(clone.parameters(), self.model.parameters(), strict=True):
                own.data = shared.data
        return clones

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> dict[str, float]:
        """With `balanced`, scale the gradients of the levels to their mean norm and add them."""
        if not self.post.balanced:
            return super()._sum_gradients(parameters)
        own = [[p for p in clone.parameters() if p.requires_grad] for clone in self.networks]
        norms = []
        for level in own:
            GradientSum(self.world, level).finish()
            total = torch.stack([p.grad.double().square().sum() for p in level if p.grad is not None]).sum()
            norms.append((total + NORM_FLOOR).sqrt())
        mean = torch.stack(norms).mean()
        scales = [(mean / (norm + NORM_FLOOR)).float() for norm in norms]
        for number, parameter in enumerate(parameters):
            grads = [(s, level[number].grad) for s, level in zip(scales, own, strict=True)]
            parameter.grad = sum((s * g for s, g in grads if g is not None), torch.zeros_like(parameter))
        for clone in self.networks:
            clone.zero_grad(set_to_none=True)
        return {f"grad_norm_{level}": float(norm) for level, norm in enumerate(norms)}

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        tensors = {
            f"{term.name}/{name}": tensor
            for term in self.terms_of_loss
            for name, tensor in term.state().items()
        }
        return {saved.STATISTICS: tensors}

    def _save(self) -> Path:
        path = self.out / MOMENTS
        if self.world.is_main and self.spaces and not path.exists():
            self.moments.save(path)
        return super()._save()

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        tensors = saved.load_tensors(folder / saved.STATISTICS)
        for term in self.terms_of_loss:
            start = f"{term.name}/"
            term.load({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})

    def _refuse(self, batch: Any, terms: dict[str, float]) -> None:
        raise NonFiniteLossError(
            f"step {self.step}, seed {self.config.seed}: the gradient is not finite. Post-train into another folder "
            f"with a lower {self.rate_field}"
        )

    def _decoder(self) -> Any:
        return self.decoder


def _level_description(space: Space, pooled_grid: int, means: Tensor | None) -> Describe:
    """What a term sees of a level; means: of the classes [K, D], from which deviations are taken."""

    def describe(canvases: Tensor, label: Tensor, pictures: Tensor | None) -> Tensor:
        rows = space.rows(canvases, pooled_grid)
        return rows if means is None else rows - means[label].to(rows.dtype)[:, None]

    return describe


def _picture_description(judge: Judge) -> Describe:
    """What a judge sees of a sample."""

    def describe(canvases: Tensor, label: Tensor, pictures: Tensor | None) -> Tensor:
        assert pictures is not None
        return judge.describe(pictures)[:, None]

    return describe
