"""What a verb calls for a run of any method: training, fitting a configuration to shards, loading a pipeline."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.data.shards import ShardIndex
from trainer.methods.latent_forcing import train as latent_train
from trainer.methods.latent_forcing.config import LatentTrainConfig
from trainer.methods.latent_forcing.pipeline import LatentPipeline, load_pixel_stage
from trainer.methods.normalizing_trajectory import train as normalizing_train
from trainer.methods.normalizing_trajectory.config import Ending, NormalizingTrainConfig
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.methods.registry import AnyConfig
from trainer.methods.trajectory_forcing import train as trajectory_train
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.training import checkpoint as saved
from trainer.training.loop import RunSummary
from trainer.trajectories.pipeline import Decoder, TrajectoryPipeline

TRAINING: dict[type, ModuleType] = {
    TrainConfig: trajectory_train,
    LatentTrainConfig: latent_train,
    NormalizingTrainConfig: normalizing_train,
}
"""The room in which a configuration is trained."""
PIPELINES: dict[str, type[TrajectoryPipeline]] = {
    "trajectory-forcing": TrajectoryPipeline,
    "latent-forcing": LatentPipeline,
    "normalizing-trajectory": NormalizingPipeline,
}
OWN = {
    "ending": ("normalizing-trajectory", "has one ending only"),
    "shift": ("latent-forcing", "draws no pixels of its own"),
}
"""What one method's pipelines alone take: of which method, and why not of another."""


def fit_to_shards(config: AnyConfig, index: ShardIndex, asked: Collection[str] = ()) -> AnyConfig:
    """`fit_to_shards` of the configuration's method."""
    fitted: AnyConfig = TRAINING[type(config)].fit_to_shards(config, index, asked)
    return fitted


def train(config: AnyConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False) -> RunSummary:
    """`train` of the configuration's method."""
    summary: RunSummary = TRAINING[type(config)].train(config, shards, out, resume, quiet)
    return summary


def load_pipeline(
    folder: str | Path,
    ema: float | str | None = "auto",
    decoder: Decoder | str | Path | None = None,
    *,
    weak: str | Path | None = None,
    pixel_stage: str | Path | None = None,
    ending: Ending | None = None,
    shift: float | None = None,
) -> TrajectoryPipeline:
    """The pipeline of a run, whatever its method; see `TrajectoryPipeline.from_pretrained`.

    pixel_stage: run of Latent Forcing that draws the pixels, in place of a decoder. ending: of a run of Normalizing
    Trajectory Models, see `normalizing_sample`. shift: of a run of Latent Forcing whose schedule has one, see
    `clocks.sampling_grid`. Raises UsageError for an ending or a shift where the run has none.
    """
    damaged: list[TrainerError] = []
    path = saved.find_checkpoint(folder, damaged)
    saved.warn_of(damaged, path)
    state = saved.load_state(path)
    method = state.config.get("method_name", "trajectory-forcing")
    if method not in PIPELINES:
        raise MismatchError(f"{folder}: found a run of {method!r}, known are {', '.join(PIPELINES)}")
    own: dict[str, Any] = {
        name: value for name, value in (("ending", ending), ("shift", shift)) if value is not None
    }
    for name, value in own.items():
        owner, reason = OWN[name]
        if method != owner:
            raise UsageError(f"--{name} {value}: {folder} is a run of {method}, which {reason}")
    if pixel_stage is not None:
        decoder = load_pixel_stage(pixel_stage, state.shards["encoder"])
    return PIPELINES[method].from_pretrained(folder, ema, decoder, weak=weak, **own)
