"""A pipeline of a small network with random weights that answer more than zero; features are those of `dct`."""

from __future__ import annotations

from pathlib import Path

import torch

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.fields import to_mapping
from trainer.data.normalisation import RAW, Normaliser
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.pipeline import TrajectoryForcingPipeline
from trainer.networks.config import ModelConfig
from trainer.training import checkpoint as saved
from trainer.training.config import OptimConfig
from trainer.training.optim import MuonAdam
from trainer.training.weights import WeightAverages
from trainer.trajectories.pipeline import TrajectoryPipeline

GRID = (6, 5)


def tiny_pipeline(seed: int = 0, normaliser: Normaliser = RAW) -> TrajectoryPipeline:
    """Grid 6×5, 48 channels, 4 levels, classes ant, bee and emu."""
    basis = DctBasis.default()
    config = ModelConfig(
        grid=GRID, in_channels=basis.width, num_classes=3, width=16, depth=2, head_depth=1, num_heads=2
    )
    torch.manual_seed(seed)
    model = TrajectoryTransformer(config)
    for name, parameter in model.named_parameters():
        if "gate" in name or name == "u_out.weight":  # both start at 0
            torch.nn.init.normal_(parameter, std=0.3)
    encoder = {"name": "dct", "grid": list(GRID), "width": basis.width, "decoder": basis.spec()}
    return TrajectoryForcingPipeline(model, ["ant", "bee", "emu"], encoder, normaliser=normaliser)


def tiny_run(out: Path, seed: int = 0) -> Path:
    """A run folder with one checkpoint of that network, its raw weights and one average."""
    pipe = tiny_pipeline(seed)
    average = WeightAverages(pipe.model, (0.5,))
    config = TrainConfig(model=pipe.model.config, optim=OptimConfig(ema_halflives_kimg=(0.5,)))
    state = saved.RunState(
        step=5,
        images_seen=40,
        config=to_mapping(config),
        shards={"encoder": pipe.encoder, "class_names": pipe.class_names, "config_hash": "0"},
    )
    optimizer = MuonAdam(pipe.model.named_parameters(), config.optim)
    saved.save_checkpoint(
        saved.checkpoint_folder(out, 5), state, pipe.model, average.state_dict(), optimizer, pipe.normaliser
    )
    return out
