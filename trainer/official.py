"""Reads the networks of the authors' released checkpoints."""

from trainer.methods.latent_forcing.release import load_latent_forcing
from trainer.methods.trajectory_forcing.release import load_checkpoint

__all__ = ["load_checkpoint", "load_latent_forcing"]
