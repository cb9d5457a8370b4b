"""Trajectories: looked at, edited, kept."""
