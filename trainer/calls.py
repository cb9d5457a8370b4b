"""Training in one call of Python, for notebooks and scripts, and the configuration that it starts from.

from trainer import train

pipe = train("out/shards", "run", preset="tiny-cpu")
pipe("cat", seed=0).decode()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hierarchy_builder.terminal import say
from trainer.methods import registry
from trainer.methods.registry import TRAJECTORY_FORCING, config_of, method_named, method_of, preset_of
from trainer.training.config import with_settings

if TYPE_CHECKING:
    from trainer.data.folders import Places
    from trainer.data.shards import ShardIndex
    from trainer.trajectories.pipeline import TrajectoryPipeline


def train(
    shards: Places,
    out: str | Path,
    preset: str | None = None,
    *,
    method: str | None = None,
    resume: str = "auto",
    quiet: bool = True,
    settings: Mapping[str, Any] | None = None,
    **fields: Any,
) -> TrajectoryPipeline:
    """Train a network on shards as `trainer train` does, and return the pipeline that samples it.

    shards: folder or URL of shards or of their build, or several, which are read as one. out: run folder or URL; the
    same call resumes it. preset: as in `trainer presets`; None takes what fits the shards and this machine. settings,
    fields: fields of the configuration by name, for example settings={"optim.lr": 0.01} or total_images=10_000. Raises
    UsageError for an unknown field or preset, MismatchError where `out` holds another run, and TrainerError for damaged
    files.
    """
    from trainer.data.shards import open_index
    from trainer.training.mirror import a_run
    from trainer.trajectories.pipeline import TrajectoryPipeline

    asked = {**(settings or {}), **fields}
    out, index = a_run(str(out), is_new=True), open_index(shards)
    base = base_config(preset, method, index, out, resume, False, quiet)
    config = registry.fit_to_shards(with_settings(base, asked), index, asked)
    registry.train(config, index, str(out), resume, quiet)
    return TrajectoryPipeline.from_pretrained(out)


def base_config(
    preset: str | None,
    method: str | None,
    shards: Places | ShardIndex,
    out: Path,
    resume: str,
    has_file: bool,
    quiet: bool,
) -> Any:
    """The configuration before file and flags: the preset, or else what the run holds, or else a suggestion.

    A run that has begun is never given another suggestion: its folder holds the configuration, and that of the
    checkpoint which `resume` names holds one too. has_file: whether a file of fields changes the method's preset.
    """
    if preset is None:
        found = _stored_config(out, resume)
        if found is not None and (method is None or method_of(found).name == method):
            return found
    row = TRAJECTORY_FORCING if method is None else method_named(method)
    if preset is not None or has_file or len(row.load("presets")) == 1:
        return preset_of(preset, method)
    from trainer.data.shards import open_index
    from trainer.methods.machine import device_at_hand, suggestion_for  # loads torch

    suggestion = suggestion_for(row, open_index(shards), device_at_hand())
    if not quiet and os.environ.get("RANK", "0") == "0":
        say(f"{suggestion.reason} --preset NAME trains another network (trainer presets).")
    return suggestion.config


def _stored_config(out: Path, resume: str) -> Any:
    """The configuration of the run in `out`, or of the checkpoint that `resume` names; None where there is neither."""
    from trainer.training.mirror import a_run
    from trainer.training.run_folder import CONFIG, read_config  # loads torch

    if (stored := out / CONFIG).exists():
        return config_of(read_config(out)["config"], str(stored))
    if resume not in ("auto", "never") and (asked := a_run(resume, is_new=True)).exists():
        from trainer.training.checkpoint import find_checkpoint, load_state

        found = find_checkpoint(asked)
        return config_of(load_state(found).config, str(found))
    return None
