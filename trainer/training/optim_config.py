"""How networks are optimised whose papers take AdamW: what Latent Forcing and Normalizing Trajectory Models share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pydantic

from hierarchy_builder.fields import STRICT, require


@dataclass(frozen=True, kw_only=True, slots=True)
class RuledOptimConfig:
    """AdamW or Muon, and the weight averages; the learning rate's course is the method's own."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    rule: Literal["adamw", "muon"] = "adamw"
    """AdamW as published, or Muon as in Trajectory Forcing, by which small networks learn in minutes."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments; with Muon of what Adam then takes."""
    weight_decay: float = 0.0
    """Decoupled weight decay; Muon here has none."""
    ema_halflives_kimg: tuple[float, ...] = (1000.0,)
    """Half-lives of the weight averages in thousands of images."""
    ema_ramp: float = 0.05
    """A half-life never exceeds this share of the images seen so far."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"lr is {self.lr}, expected above 0, and finite")
        for decay in self.betas:
            require(0 <= decay < 1, f"betas hold {decay}, expected 0 up to below 1")
        for halflife in self.ema_halflives_kimg:
            require(0 < halflife < math.inf, f"ema_halflives_kimg holds {halflife}, expected above 0")
        for name in ("ema_ramp", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        require(
            self.rule == "adamw" or self.weight_decay == 0,
            f"weight_decay is {self.weight_decay} with rule {self.rule}, expected 0: Muon here has none",
        )

    def check_shares(self, *names: str) -> None:
        """Refuse fields of these names that are no share from 0 to 1."""
        for name in names:
            found = getattr(self, name)
            require(0 <= found <= 1, f"{name} is {found}, expected a share from 0 to 1")
