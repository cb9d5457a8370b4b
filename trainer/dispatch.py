"""What a verb calls for a run of any method: training, fitting a configuration to shards, loading a pipeline."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from trainer import checkpoint as saved
from trainer import latent_train, normalizing_train
from trainer import train as trajectory_train
from trainer.errors import UsageError
from trainer.latent_config import LatentTrainConfig
from trainer.latent_pipeline import LatentPipeline, load_pixel_stage
from trainer.loop import RunSummary
from trainer.normalizing_config import Ending, NormalizingTrainConfig
from trainer.normalizing_pipeline import NormalizingPipeline
from trainer.pipeline import Decoder, TrajectoryPipeline
from trainer.run_kinds import AnyConfig
from trainer.shards import ShardIndex


def fit_to_shards(config: AnyConfig, index: ShardIndex, asked: Collection[str] = ()) -> AnyConfig:
    """`fit_to_shards` of the configuration's method."""
    if isinstance(config, LatentTrainConfig):
        return latent_train.fit_to_shards(config, index, asked)
    if isinstance(config, NormalizingTrainConfig):
        return normalizing_train.fit_to_shards(config, index, asked)
    return trajectory_train.fit_to_shards(config, index, asked)


def train(config: AnyConfig, shards: str, out: str, resume: str = "auto", quiet: bool = False) -> RunSummary:
    """`train` of the configuration's method."""
    if isinstance(config, LatentTrainConfig):
        return latent_train.train(config, shards, out, resume, quiet)
    if isinstance(config, NormalizingTrainConfig):
        return normalizing_train.train(config, shards, out, resume, quiet)
    return trajectory_train.train(config, shards, out, resume, quiet)


def load_pipeline(
    folder: str | Path,
    ema: float | str | None = "auto",
    decoder: Decoder | str | Path | None = None,
    *,
    weak: str | Path | None = None,
    pixel_stage: str | Path | None = None,
    ending: Ending | None = None,
) -> TrajectoryPipeline:
    """The pipeline of a run, whatever its method; see `TrajectoryPipeline.from_pretrained`.

    pixel_stage: run of Latent Forcing that draws the pixels, in place of a decoder. ending: of a run of Normalizing
    Trajectory Models, see `normalizing_sample`. Raises UsageError for an ending where the run has none.
    """
    state = saved.load_state(saved.find_checkpoint(folder))
    method = state.config.get("method_name", "trajectory-forcing")
    if ending is not None and method != "normalizing-trajectory":
        raise UsageError(f"--ending {ending}: {folder} is a run of {method}, which has one ending only")
    if pixel_stage is not None:
        decoder = load_pixel_stage(pixel_stage, state.shards["encoder"])
    if method == "normalizing-trajectory":
        return NormalizingPipeline.from_pretrained(folder, ema, decoder, weak=weak, ending=ending)
    kind = LatentPipeline if method == "latent-forcing" else TrajectoryPipeline
    return kind.from_pretrained(folder, ema, decoder, weak=weak)
