"""Normalizing Trajectory Models: trajectories with an exact likelihood."""
