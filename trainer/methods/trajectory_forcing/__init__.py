"""Trajectory Forcing."""

from trainer.methods.trajectory_forcing.objective import loss

__all__ = ["loss"]
