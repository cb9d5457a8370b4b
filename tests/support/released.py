"""Checkpoints and vectors of the authors' release, as the tests of parity read them."""

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.release import (
    load_checkpoint,
)


def golden_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an npz, integers as int64."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    return {name: a.long() if a.dtype == torch.int32 else a for name, a in arrays.items()}


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found.detach() - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=["tf_tiny", "tf_tiny_cfg"])
def golden(request: pytest.FixtureRequest, shared: Path) -> Path:
    return shared / "golden" / request.param


def load(golden: Path, ema: int | None = None) -> TrajectoryTransformer:
    return load_checkpoint(golden / "flax" / "checkpoint_1234", golden / "config.json", ema=ema)


KERNEL = ("params", "net", "x_embedder", "proj", "_flax_linear", "kernel")


def changed(golden: Path, to: Path, value: Any, place: tuple[str, ...] = KERNEL) -> Path:
    """A checkpoint with another value at one place; an array of it is given as (shape, dtype, bytes)."""
    tree = msgpack.unpackb(
        (golden / "flax" / "checkpoint_1234").read_bytes(), raw=False, strict_map_key=False
    )
    branch = tree
    for name in place[:-1]:
        branch = branch[name]
    if isinstance(value, tuple):
        value = msgpack.ExtType(1, msgpack.packb(value))
    branch[place[-1]] = value
    to.write_bytes(msgpack.packb(tree))
    return to
