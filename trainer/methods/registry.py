"""The methods a run can be of, by name: their presets, and which configuration is whose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import named
from trainer.methods.latent_forcing.config import LatentTrainConfig
from trainer.methods.latent_forcing.presets import LATENT_PRESETS
from trainer.methods.normalizing_trajectory.config import NormalizingTrainConfig
from trainer.methods.normalizing_trajectory.presets import NORMALIZING_PRESETS
from trainer.methods.trajectory_forcing.config import TrainConfig
from trainer.methods.trajectory_forcing.presets import PRESETS
from trainer.training.config import checked

AnyConfig = TrainConfig | LatentTrainConfig | NormalizingTrainConfig
METHODS: dict[str, Mapping[str, Callable[[], AnyConfig]]] = {
    "trajectory-forcing": PRESETS,
    "latent-forcing": LATENT_PRESETS,
    "normalizing-trajectory": NORMALIZING_PRESETS,
}
"""Presets of each method."""
DEFAULTS = {"trajectory-forcing": "TF-B", "latent-forcing": "LF-LM", "normalizing-trajectory": "NTM-B"}
"""The preset of a method where none is asked for."""
SMALL = {
    "trajectory-forcing": "tiny-cpu",
    "latent-forcing": "tiny-latent",
    "normalizing-trajectory": "tiny-normalizing",
}
"""The preset of a method for CPU cores."""
ALL_PRESETS: dict[str, Callable[[], AnyConfig]] = {
    name: make for presets in METHODS.values() for name, make in presets.items()
}


def config_of(mapping: Mapping[str, Any], where: str) -> AnyConfig:
    """A checked configuration from plain nested data, of the method it names."""
    if mapping.get("method_name") == "latent-forcing":
        return checked(LatentTrainConfig, mapping, where)
    if mapping.get("method_name") == "normalizing-trajectory":
        return checked(NormalizingTrainConfig, mapping, where)
    return checked(TrainConfig, mapping, where)


def method_of(config: AnyConfig) -> str:
    """Name of the method of a configuration."""
    return "trajectory-forcing" if isinstance(config, TrainConfig) else config.method_name


def preset_of(name: str | None, method: str | None) -> AnyConfig:
    """The preset called `name`, or the default one of a method; without either that of Trajectory Forcing.

    Raises UsageError for an unknown name, naming the nearest, and for a preset of another method.
    """
    if method is not None and method not in METHODS:
        raise UsageError(f"unknown method {method!r}, known are {', '.join(METHODS)}")
    name = name or DEFAULTS[method or "trajectory-forcing"]
    config = named(ALL_PRESETS, name, "preset")()
    if method is not None and method_of(config) != method:
        known = ", ".join(METHODS[method])
        raise UsageError(f"preset {name} is of {method_of(config)}, not of {method}: known are {known}")
    return config
