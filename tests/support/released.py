"""Checkpoints and vectors of the authors' release, as the tests of parity read them."""

import gzip
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.release import load_checkpoint, to_official, write_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
"""Vectors that the authors' releases produced; their README says how."""


def golden_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an npz, integers as int64."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    return {name: a.long() if a.dtype == torch.int32 else a for name, a in arrays.items()}


def save_checkpoint(
    model: TrajectoryTransformer,
    path: Path,
    *,
    averages: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    step: int = 0,
) -> None:
    """Write weights and weight averages, without an optimiser, as a checkpoint file of the release."""
    parts = {
        "step": step,
        "params": to_official(dict(model.named_parameters())),
        "ema_params": {halflife: to_official(average) for halflife, average in (averages or {}).items()},
    }
    write_checkpoint(path, parts)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found.detach() - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session", params=["tf_tiny", "tf_tiny_cfg"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of one folder of vectors, with the checkpoint as the release wrote it; tests only read it."""
    folder = tmp_path_factory.mktemp("golden") / request.param
    shutil.copytree(GOLDEN / request.param, folder, ignore=shutil.ignore_patterns("*.gz"))
    (folder / "flax").mkdir()
    stored = gzip.decompress((GOLDEN / request.param / "checkpoint_1234.gz").read_bytes())
    (folder / "flax" / "checkpoint_1234").write_bytes(with_averages(stored))
    return folder


def with_averages(stored: bytes) -> bytes:
    """The release's checkpoint from a stored one, which lacks the weight averages.

    When the checkpoint was made, the averages were set to the weights times 1.01, 1.02 and 1.03 in float32.
    """
    tree = msgpack.unpackb(stored, raw=False, strict_map_key=False)
    factors = {"500": 1.01, "1000": 1.02, "2000": 1.03}
    tree["ema_params"] = {name: _scaled(tree["params"], factor) for name, factor in factors.items()}
    return msgpack.packb(tree)


def _scaled(branch: Any, factor: float) -> Any:
    if isinstance(branch, dict):
        return {name: _scaled(inner, factor) for name, inner in branch.items()}
    shape, dtype, data = msgpack.unpackb(branch.data, raw=False)
    scaled = np.frombuffer(data, dtype) * np.float32(factor)
    return msgpack.ExtType(branch.code, msgpack.packb((shape, dtype, scaled.tobytes())))


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
