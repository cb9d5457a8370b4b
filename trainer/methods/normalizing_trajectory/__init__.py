"""Normalizing Trajectory Models."""
