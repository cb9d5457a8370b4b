"""Samples every level of Trajectory Forcing, by the path that the documentation promises."""

from trainer.methods.trajectory_forcing.sample import sample_levels

__all__ = ["sample_levels"]
