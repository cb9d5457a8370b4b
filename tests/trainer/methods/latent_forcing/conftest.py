"""Runs of Latent Forcing that the tests of this folder share and only read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import LATENT

from trainer.methods import registry
from trainer.methods.latent_forcing.config import LatentTrainConfig


@pytest.fixture(scope="session")
def run(picture_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on tokens and pixels."""
    return _trained(LATENT, picture_shards, tmp_path_factory.mktemp("runs") / "tokens")


@pytest.fixture(scope="session")
def levels_run(picture_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on all levels and pixels."""
    config = dataclasses.replace(LATENT, pixel_stage=True)
    return _trained(config, picture_shards, tmp_path_factory.mktemp("runs") / "levels")


def _trained(config: LatentTrainConfig, shards: str, out: Path) -> Path:
    registry.train(config, shards, str(out), quiet=True)
    return out
