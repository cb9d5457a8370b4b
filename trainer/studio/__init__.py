"""Trajectories in a browser."""
