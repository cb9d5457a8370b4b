"""Training of Normalizing Trajectory Models; see `trainer.training.method_run` for the part that all methods share.

There are three kinds of run: from scratch; from a network of Trajectory Forcing (`init_from`), where the new network
at first equals that network's posterior sampler; and training only the learned denoiser of a finished run, with
everything else frozen (`distil_from`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.fields import identity
from trainer.data.normalisation import Normaliser
from trainer.data.shards import ShardIndex, check_trained_on
from trainer.data.stream import Batch
from trainer.methods.normalizing_trajectory import objective as method
from trainer.methods.normalizing_trajectory.chains import check_first_step
from trainer.methods.normalizing_trajectory.config import NormalizingTrainConfig
from trainer.methods.normalizing_trajectory.network import FlowPredictor, NormalizingNetwork
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.methods.registry import (
    NORMALIZING_TRAJECTORY,
    TRAJECTORY_FORCING,
    Method,
    config_of,
    method_of,
)
from trainer.seeds import StepRows
from trainer.training import checkpoint as saved
from trainer.training.method_run import MethodRun, with_model
from trainer.training.schedules import warmup_cosine
from trainer.training.weights import average_of


def _fitted(config: NormalizingTrainConfig, index: ShardIndex) -> NormalizingTrainConfig:
    found: dict[str, Any] = {"num_levels": index.num_levels}
    if config.init_from is not None:
        # Resolved once, because the loss compares with this network until the end, even if that run continues.
        source, flow = _read_run(config.init_from, "init_from", TRAJECTORY_FORCING)
        found |= {"trajectory": "canvases", "backbone": flow.model}
        config = dataclasses.replace(config, init_from=str(source), normalise=flow.normalise)
    if found.get("trajectory", config.model.trajectory) == "levels":
        found["num_steps"] = (index.num_levels,)
    config = with_model(config, index, **found)
    if (trained := config.model.backbone) is not None:
        check_trained_on(index, trained, {}, str(config.init_from))
    return config


def _distilling(config: NormalizingTrainConfig, run: str, index: ShardIndex) -> NormalizingTrainConfig:
    """Take network and method from the run to distil; the denoiser defaults to a third of the predictor's depth."""
    _, source = _read_run(run, "distil_from", NORMALIZING_TRAJECTORY)
    check_trained_on(index, source.model, {}, run)
    depth = config.model.denoiser_depth or max(1, source.model.depth // 3)
    model = dataclasses.replace(source.model, denoiser_depth=depth)
    return dataclasses.replace(config, model=model, method=source.method, normalise=source.normalise)


def _read_run(run: str, field: str, method: Method) -> tuple[Path, Any]:
    """Find the newest checkpoint of a run, and its configuration. Raises UsageError for a run of another method."""
    folder = saved.find_checkpoint(run)
    config = config_of(saved.load_state(folder).config, str(folder))
    if (found := method_of(config)) is not method:
        raise UsageError(f"{field}={folder}: found a run of {found.name}, expected one of {method.name}")
    return folder, config


class NormalizingRun(MethodRun):
    """One run of Normalizing Trajectory Models in one process."""

    terms: tuple[str, ...] = ("loss", "bits", "fit", "log_sigma", "log_det", "flow")
    shown: tuple[str, ...] = ("bits", "log_det")
    pipeline = NormalizingPipeline
    loss_function = staticmethod(method.loss)
    model: NormalizingNetwork
    flow: nn.Module | None = None
    """The predictor before training, to whose means it is pulled."""

    @classmethod
    def fitted(
        cls, config: NormalizingTrainConfig, index: ShardIndex, asked: Collection[str] = ()
    ) -> NormalizingTrainConfig:
        """Return the config with the model's grid, channels, classes and levels set from the shards.

        The network of `distil_from` and the backbone of `init_from` come from those runs; `init_from` is resolved to
        the run's newest checkpoint. asked: dotted names of the fields that the user set. Raises MismatchError with both
        values if one of them differs from the shards or the run, and UsageError if the run is of the wrong method or
        t_min leaves no first step.
        """
        run = config.distil_from
        fitted = _fitted(config, index) if run is None else _distilling(config, run, index)
        wanted, found = identity(config), identity(fitted)
        for name in asked:
            if name in wanted and name != "init_from" and wanted[name] != found[name]:
                raise MismatchError(
                    f"{name} is {wanted[name]}, {index.url} or the run to start from has {found[name]}: leave it out"
                )
        if fitted.model.trajectory != "levels":
            t_min = max(fitted.method.t_min[1], fitted.method.sampling_t_min)
            check_first_step(t_min, max(fitted.model.num_steps), math.prod(fitted.model.grid))
        return fitted

    def __init__(self, config: NormalizingTrainConfig, *others: Any) -> None:
        if config.distil_from:
            self.terms, self.shown = ("loss",), ("loss",)
        super().__init__(config, *others)

    def _network(self) -> NormalizingNetwork:
        network = fresh_network(self.config)
        if self.config.init_from is not None and self.config.method.flow_weight:
            self.flow = copy.deepcopy(network.predictor).eval().requires_grad_(False).to(self.world.device)
        return network

    def _first_normaliser(self, origin: Path | None) -> Normaliser:
        source = origin or self.config.init_from or self.config.distil_from
        return super()._first_normaliser(saved.find_checkpoint(source) if source else None)

    def _rate(self) -> float:
        config, optim = self.config, self.config.optim
        seen = self.images_seen + config.batch_size
        return warmup_cosine(
            seen, config.total_images, optim.lr, optim.warmup_fraction, optim.final_lr_fraction
        )

    def _terms(self, part: Batch, rows: StepRows) -> dict[str, Tensor]:
        config = self.config
        tokens_only = config.model.trajectory == "tokens"
        canvases = part.tokens(self.normaliser)[:, None] if tokens_only else part.canvases(self.normaliser)
        draws = method.draw_batch(rows, canvases.shape[2:], config.method, config.model.num_steps)
        chain = method.build_chain(
            canvases,
            torch.where(draws.drop_label, config.model.num_classes, part.label),
            part.level,
            noise=draws.noise,
            t_min=draws.t_min,
            trajectory=config.model.trajectory,
            level_noise=config.method.level_noise,
        )
        with self._autocast():
            if config.distil_from:
                return {"loss": method.denoiser_loss(self.model, chain, draws.num_steps)}
            return self.objective(
                self.model,
                chain.states,
                chain.times,
                chain.given,
                num_steps=draws.num_steps,
                pair=draws.pair,
                flow=self.flow,
                flow_weight=chain.states.new_tensor(self._flow_weight()),
            )

    def _flow_weight(self) -> float:
        """Return λ, which falls to 0 along a cosine over the run."""
        share = min(1.0, self.images_seen / self.config.total_images)
        return self.config.method.flow_weight * 0.5 * (1 + math.cos(math.pi * share))


def fresh_network(config: NormalizingTrainConfig) -> NormalizingNetwork:
    """Build the initial network: random, or with the weights of the run it starts from."""
    network = NormalizingNetwork(config.model)
    if config.init_from is not None:
        folder, flow = _read_run(config.init_from, "init_from", TRAJECTORY_FORCING)
        assert isinstance(network.predictor, FlowPredictor)
        backbone = network.predictor.backbone
        backbone.load_state_dict(saved.load_weights(folder, average_of(flow, "auto")))
        # The u-head is not used, so it gets no gradient; otherwise zeros would be summed over ranks at every step.
        for module in (backbone.u_blocks, backbone.u_norm, backbone.u_out):
            module.requires_grad_(False)
    if config.distil_from is not None:
        folder, source = _read_run(config.distil_from, "distil_from", NORMALIZING_TRAJECTORY)
        weights = saved.load_weights(folder, average_of(source, "auto"))
        frozen = {name: weights[name] for name in network.state_dict() if not name.startswith("denoiser.")}
        network.load_state_dict(frozen, strict=False)  # the denoiser stays random; its depth may differ
        network.requires_grad_(False)
        assert network.denoiser is not None
        network.denoiser.requires_grad_(True)
    return network
