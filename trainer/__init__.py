"""Trains and samples the hierarchy-conditioned one-step flow model of Trajectory Forcing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hierarchy_builder import __version__ as __version__

if TYPE_CHECKING:
    from trainer.calls import train as train
    from trainer.trajectories.pipeline import Trajectory as Trajectory
    from trainer.trajectories.pipeline import TrajectoryPipeline as TrajectoryPipeline

HOMES = {
    "Trajectory": "trajectories.pipeline",
    "TrajectoryPipeline": "trajectories.pipeline",
    "train": "calls",
}
"""The module of each public name, which is loaded on first use so that `import trainer` stays light."""
__all__ = ["Trajectory", "TrajectoryPipeline", "train"]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"trainer.{HOMES[name]}"), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
