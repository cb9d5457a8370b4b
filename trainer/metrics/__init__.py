"""Metrics of samples and trajectories, as functions of arrays."""
