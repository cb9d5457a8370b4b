"""Latent Forcing: latents first, then the pixels that they describe, in one network."""
