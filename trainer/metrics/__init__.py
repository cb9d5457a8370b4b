"""Measures of samples and trajectories; each yields (name, value)."""
