"""The methods that a run can be of, one row each, and what the rest of the package asks of a run by its method.

A row names modules, which are imported when something of them is first used. So `trainer --help` loads no torch, and
a pipeline can ask for the class that draws the samples of a run, although the pipelines of the methods are built on it.
A further method is one folder with these modules and one row, given to `register`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.fields import named
from trainer.training.config import checked

if TYPE_CHECKING:
    from trainer.data.folders import Places
    from trainer.data.shards import ShardIndex
    from trainer.training.loop import RunSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row: where the parts of a method are, each as `module` or `module:name`."""

    name: str
    """The name that `--method` takes and the configuration of a run holds."""
    paper: str = ""
    """The number of its paper at arXiv, for the card of a network."""
    config: str
    """The class of its configurations, with `model`, `method` and `optim`."""
    presets: str
    """Its presets: name → function that makes a configuration."""
    default_preset: str
    """The preset that a file of fields changes where no preset is named; without a file, one is suggested."""
    small_preset: str
    """The preset that trains on CPU cores."""
    run: str
    """Its subclass of `trainer.training.method_run.MethodRun`."""
    pipeline: str
    """Its subclass of `trainer.trajectories.pipeline.TrajectoryPipeline`."""
    losses_text: str
    """What the page of a run says about the curves of its losses."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options that its pipelines alone take: name → why they need a run of this method."""

    @property
    def title(self) -> str:
        """Its name as a heading."""
        return self.name.replace("-", " ").title()

    def load(self, part: str) -> Any:
        """The object or module that a field of the row names."""
        module, _, name = getattr(self, part).partition(":")
        loaded = importlib.import_module(module)
        return getattr(loaded, name) if name else loaded


TRAJECTORY_FORCING = Method(
    name="trajectory-forcing",
    paper="2606.22527",
    config="trainer.methods.trajectory_forcing.config:TrainConfig",
    presets="trainer.methods.trajectory_forcing.presets:PRESETS",
    default_preset="TF-B",
    small_preset="tiny-cpu",
    run="trainer.methods.trajectory_forcing.train:TrajectoryForcingRun",
    pipeline="trainer.methods.trajectory_forcing.pipeline:TrajectoryForcingPipeline",
    losses_text="The losses of u and v are divided by their own size and stay near 1; the squared errors behind them "
    "are what falls.",
)
LATENT_FORCING = Method(
    name="latent-forcing",
    paper="2602.11401",
    config="trainer.methods.latent_forcing.config:LatentTrainConfig",
    presets="trainer.methods.latent_forcing.presets:LATENT_PRESETS",
    default_preset="LF-LM",
    small_preset="tiny-latent",
    run="trainer.methods.latent_forcing.train:LatentForcingRun",
    pipeline="trainer.methods.latent_forcing.pipeline:LatentPipeline",
    losses_text="loss_pixels and loss_latents are squared errors of v, averaged over the whole batch: a sample that "
    "does not train one of the two counts as 0 in its average.",
    options={"shift": "only Latent Forcing draws latents ahead of pixels"},
)
NORMALIZING_TRAJECTORY = Method(
    name="normalizing-trajectory",
    paper="2605.08078",
    config="trainer.methods.normalizing_trajectory.config:NormalizingTrainConfig",
    presets="trainer.methods.normalizing_trajectory.presets:NORMALIZING_PRESETS",
    default_preset="NTM-B",
    small_preset="tiny-normalizing",
    run="trainer.methods.normalizing_trajectory.train:NormalizingRun",
    pipeline="trainer.methods.normalizing_trajectory.pipeline:NormalizingPipeline",
    losses_text="bits are −log₂ of the density of chains of normalised features, per number of a canvas, and may fall "
    "below 0: fit + log_sigma − log_det, which are in nats as the loss is. The loss of a learned denoiser is its "
    "squared distance to what the scores say.",
    options={"ending": "only Normalizing Trajectory Models can end a trajectory in several ways"},
)
METHODS = {row.name: row for row in (TRAJECTORY_FORCING, LATENT_FORCING, NORMALIZING_TRAJECTORY)}
"""The rows by name. Trajectory Forcing comes first: runs that name no method are its runs."""


def register(method: Method) -> None:
    """Add a row. Raises UsageError where another method has its name."""
    if method.name in METHODS:
        raise UsageError(f"method {method.name!r} is registered already: give the row another name")
    METHODS[method.name] = method


def method_named(name: str) -> Method:
    """The row of that name. Raises UsageError listing the names that there are."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}, known are {', '.join(METHODS)}")
    return METHODS[name]


def method_in(mapping: Mapping[str, Any], where: object) -> Method:
    """The method of a configuration that was read from `where`. Raises MismatchError where no row has its name."""
    name = mapping.get("method_name", TRAJECTORY_FORCING.name)
    if name not in METHODS:
        raise MismatchError(f"{where}: found a run of {name!r}, known are {', '.join(METHODS)}")
    return METHODS[name]


def method_of(config: Any) -> Method:
    """The method of a configuration."""
    return METHODS[getattr(config, "method_name", TRAJECTORY_FORCING.name)]


def config_of(mapping: Mapping[str, Any], where: str) -> Any:
    """A checked configuration from plain nested data, of the class that its method has."""
    return checked(method_in(mapping, where).load("config"), mapping, where)


def all_presets() -> dict[str, Callable[[], Any]]:
    """The presets of all methods by name."""
    return {name: make for method in METHODS.values() for name, make in method.load("presets").items()}


def preset_of(name: str | None, method: str | None) -> Any:
    """The preset called `name`, or the default one of a method; without either that of Trajectory Forcing.

    Raises UsageError for an unknown name, naming the nearest, and for a preset of another method.
    """
    row = TRAJECTORY_FORCING if method is None else method_named(method)
    name = name or row.default_preset
    config = named(all_presets(), name, "preset")()
    if method is not None and method_of(config) is not row:
        known = ", ".join(row.load("presets"))
        raise UsageError(f"preset {name} is of {method_of(config).name}, not of {method}: known are {known}")
    return config


def fit_to_shards(config: Any, index: ShardIndex, asked: Collection[str] = ()) -> Any:
    """The configuration with the sizes of the network that the shards have.

    asked: dotted names of the fields that were set on purpose. Raises MismatchError where one of these is not what the
    shards have.
    """
    return method_of(config).load("run").fitted(config, index, asked)


def train(
    config: Any, shards: Places | ShardIndex, out: str, resume: str = "auto", quiet: bool = False
) -> RunSummary:
    """Train a run of the method of `config` in the run folder `out`, with the sizes of the shards.

    See `run_method` for `resume` and the errors; shards without what the method reads raise TrainerError.
    """
    from trainer.data.shards import open_index
    from trainer.training.method_run import run_method  # loads torch

    index = open_index(shards)
    run = method_of(config).load("run")
    return run_method(run, fit_to_shards(config, index), index, out, resume, quiet)


def options_for(method: Method, options: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The options that were given, None meaning not given, where `method` takes each of them.

    Raises UsageError for an option that another method takes, TypeError for one that no method takes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        owner = next((row for row in METHODS.values() if name in row.options), None)
        if owner is None:
            raise TypeError(f"unknown option {name!r} of a pipeline")
        if name not in method.options:
            raise UsageError(
                f"--{name} {value}: {where} is a run of {method.name}, and {owner.options[name]}; leave it out"
            )
    return given
