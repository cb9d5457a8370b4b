"""Latent Forcing."""
