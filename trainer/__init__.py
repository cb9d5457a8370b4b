"""Trains and samples the hierarchy-conditioned one-step flow model of Trajectory Forcing."""

from __future__ import annotations

from typing import Any

__all__ = ["Trajectory", "TrajectoryPipeline"]


def __getattr__(name: str) -> Any:
    """Load the public face on first use, so that `import trainer` stays light."""
    if name in __all__:
        from trainer.trajectories import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
