"""Schedules of training, by the path that the documentation promises."""

from trainer.training.schedules import ema_beta, plateau_logit_normal

__all__ = ["ema_beta", "plateau_logit_normal"]
