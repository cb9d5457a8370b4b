"""Conversion of checkpoints of the authors' release to run folders and back, both without loss.

A file of the release becomes a run folder with one checkpoint: raw weights, every weight average, the optimiser and
the step, so that the run can be sampled and trained further. Such a checkpoint becomes a file again. Parts are
converted one by one: memory is about four times the network to import and once to export, whatever the file holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.exclusion import of_exclusion
from hierarchy_builder.files.whole import target_of, write_bytes
from hierarchy_builder.machine.vision_libraries import import_vision
from trainer.data.normalisation import RAW
from trainer.methods.trajectory_forcing import release as official
from trainer.methods.trajectory_forcing.config import RELEASE_SHIFT, TrainConfig
from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
from trainer.methods.trajectory_forcing.presets import PRESETS
from trainer.networks.config import ModelConfig
from trainer.training import checkpoint as saved
from trainer.training.config import checked
from trainer.training.optim import NEWTON_SCHULZ, MuonAdam
from trainer.training.release_files import check_weights, read_fields
from trainer.training.run_folder import CONFIG, locked, write_config

CONFIG_FILE = "config.json"
BATCH_SIZE = "batch_size"
"""A field of config.json that the release lacks, since it counts steps where we count images."""
METHOD_NAMES = {
    "time_mean": "P_mean",
    "time_std": "P_std",
    "time_shift": "time_dist_shift",
    "uniform_fraction": "tr_uniform_prob",
    "data_fraction": "data_proportion",
    "region_weight": "region_var_weight",
}
"""Fields of MethodConfig and the release's names for them."""
IMAGENET_CLASSES = 1000
STATE = "inner_states/{rule}/inner_state/0"
"""Path of the state of each rule in the release's optimiser state."""
SLOTS = {"muon": {"momentum": "mu"}, "adam": {"momentum": "mu", "square": "nu"}}
"""Moments by rule: our name → the release's name."""


def import_official(
    file: Path,
    out: Path,
    config: Path | None = None,
    ema: str | None = None,
    encoder: str = "dinov2-reg-base",
) -> dict[str, Any]:
    """Write the run folder `out` from a checkpoint file of the release, and return what it holds.

    config: its configuration; by default config.json next to the file or in the folder above, and without one the
    sizes are read from the shapes of the weights. ema: half-life in kimg of the weight average to sample from; by
    default the first. encoder: name of the encoder it was trained on.
    Raises UsageError if the configuration is incomplete or `out` holds a run, MismatchError if the file is damaged,
    does not fit it, or lacks the average.
    """
    place = config or _find_config(file)
    given = read_fields(place) if place else official.config_of(official.read_part(file, "params"), file)
    where = str(place or file)
    model_config = official.read_config(given, where)
    names = [name for name, _ in official.read_parts(file, lambda name: False)]
    for needed in ("params", official.part_name(ema)):
        if needed not in names:
            raise official.missing_part(needed, names, file)
    halflives = [name.removeprefix(official.AVERAGE) for name in names if name.startswith(official.AVERAGE)]
    halflives.sort(key=lambda name: name != ema)
    train_config = _train_config(model_config, given, [_halflife(name, file) for name in halflives], where)
    if saved.list_checkpoints(out) or (out / CONFIG).exists():
        raise UsageError(f"{out} holds a run, its checkpoints or {CONFIG}; import into another folder")
    step, shards = official.read_part(file, "step"), _unknown_shards(model_config, encoder)
    state = saved.RunState(
        step=step,
        images_seen=step * train_config.batch_size,
        config=to_mapping(train_config),
        shards=shards,
    )
    _write_run(out, state, _converted(file, train_config, state))
    return {
        "run": str(out),
        "network": _described(model_config, given),
        "sizes_from": str(place)
        if place
        else "the shapes of its weights, as no config.json of the release lies beside it",
        "class_names": "ImageNet's, from torchvision"
        if shards["class_names"][0] != "0"
        else "numbers, as the file has no names",
        "step": state.step,
        "images_seen": state.images_seen,
        "batch_size": train_config.batch_size,
        "batch_size_from": CONFIG_FILE
        if BATCH_SIZE in given
        else f"preset {train_config.preset}, as the file does not say; images_seen follows from it",
        "averages": halflives,
        "optimizer_step": max((group["step"] for group in state.optimizer), default=0),
    }


def export_official(run: Path, out: Path) -> dict[str, Any]:
    """Write the newest checkpoint of a run as `out`/checkpoint_<step> and `out`/config.json.

    Raises MismatchError for a run of another method or on normalised features, which the release's format cannot
    record, or whose weights are not finite or do not fit its configuration; UsageError for other networks that the
    format cannot hold.
    """
    folder, state = saved.read_checkpoint(run)
    config = checked(TrainConfig, state.config, str(folder))
    normaliser = saved.load_normaliser(folder)
    if bool(normaliser.mean.any()) or bool((normaliser.std != 1).any()):
        raise MismatchError(
            f"{folder}: trained with normalise={config.normalise}; the release's format has no place for that"
        )
    fields = official.official_config(config.model) | {
        theirs: getattr(config.method, ours) for ours, theirs in METHOD_NAMES.items()
    }
    halflives = saved.averages_of(folder)
    target_of(out / CONFIG_FILE)
    with torch.device("meta"):
        model = TrajectoryTransformer(config.model)
    file = out / f"checkpoint_{state.step}"
    official.write_checkpoint(
        file,
        {
            "step": state.step,
            "params": lambda: _official_weights(folder, None, model),
            "opt_state": lambda: _official_optimizer(folder, state, model, config),
            "ema_params": {
                name: lambda name=name: _official_weights(folder, name, model) for name in halflives
            },
        },
    )
    write_bytes(
        out / CONFIG_FILE,
        json.dumps(fields | {"ckpt_step": state.step, BATCH_SIZE: config.batch_size}, indent=1).encode(),
    )
    return {"file": str(file), "step": state.step, "averages": halflives}


def _write_run(out: Path, state: saved.RunState, files: Iterator[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Write the run folder of one checkpoint; if that fails, a folder that did not exist before is removed."""
    is_new = not out.exists()
    with locked(out):
        is_new = is_new and all(map(of_exclusion, os.listdir(out)))  # else another import came first
        try:
            saved.write_folder(saved.checkpoint_folder(out, state.step), state, files)
            content = {
                "config": state.config,
                "shards": state.shards,
                "version": version("trajectory-hierarchies"),
            }
            write_config(out, content)
        except BaseException:
            if is_new and all(
                of_exclusion(name) or name in (CONFIG, "checkpoints") for name in os.listdir(out)
            ):
                shutil.rmtree(out)
            raise


def _halflife(name: str, file: Path) -> float:
    """Parse the name of a weight average of the file, which is its half-life."""
    try:
        halflife = float(name)
    except ValueError:
        halflife = math.nan
    if not 0 < halflife < math.inf:
        raise MismatchError(f"{file} holds the weight average {name!r}, expected half-lives in kimg")
    return halflife


def _find_config(file: Path) -> Path | None:
    """The config.json beside the file or in the folder above, unless it is of something else, such as a decoder."""
    # The folder of the given name comes first: the file may be a link into a cache of downloads.
    places = [
        folder / CONFIG_FILE for path in (file.absolute(), file.resolve()) for folder in path.parents[:2]
    ]
    own = {"model_str", official.CONFIG_NAMES["num_levels"]}
    return next((place for place in places if place.exists() and own & read_fields(place).keys()), None)


def _described(model: ModelConfig, given: Mapping[str, Any]) -> str:
    letter = official.size_letter(given) or ""
    is_known = official.SIZES.get(letter) == (model.width, model.depth, model.num_heads)
    return (
        f"{f'TF-{letter}' if is_known else 'no released size'}: {model.depth} blocks of width {model.width} "
        f"with {model.num_heads} heads, {model.num_levels} levels of {model.grid[0]}×{model.grid[1]}×"
        f"{model.in_channels}, {model.num_classes} classes"
    )


def _class_names(count: int) -> list[str]:
    """Names of the classes: torchvision's list for the 1,000 of ImageNet, which the release trains on, else numbers."""
    names: list[str] = []
    if count == IMAGENET_CLASSES:
        with contextlib.suppress(ImportError, AttributeError):  # another torchvision keeps them elsewhere
            names = list(import_vision("torchvision.models._meta")._IMAGENET_CATEGORIES)
    if len(names) != count:
        return [str(label) for label in range(count)]
    twice = {name for name in names if names.count(name) > 1}  # such as crane, a bird and a machine
    return [f"{name} ({label})" if name in twice else name for label, name in enumerate(names)]


def _train_config(
    model: ModelConfig, given: Mapping[str, Any], halflives: list[float], where: str
) -> TrainConfig:
    """Make the configuration of the file's training: a preset, changed by the release's own configuration."""
    base = PRESETS[f"TF-{official.size_letter(given) or 'B'}"]()
    fields, method = to_mapping(base), to_mapping(base.method) | {"time_shift": RELEASE_SHIFT}
    method |= {ours: given[theirs] for ours, theirs in METHOD_NAMES.items() if theirs in given}
    if not given.get("time_shift", True):
        method["time_shift"] = 1.0
    if not given.get("tr_uniform", True):
        method["uniform_fraction"] = 0.0
    fields |= {"model": to_mapping(model), "method": method, "normalise": "none"}
    fields["optim"] |= {"ema_halflives_kimg": halflives}
    return checked(TrainConfig, fields | {BATCH_SIZE: given.get(BATCH_SIZE, base.batch_size)}, where)


def _unknown_shards(model: ModelConfig, encoder: str) -> dict[str, Any]:
    """Describe shards of which only the encoder and the sizes are known; training may go on with other shards."""
    grid = list(model.grid)
    return {
        "name": "",
        "split": None,
        "num_samples": None,
        "num_levels": model.num_levels,
        "grid": grid,
        "width": model.in_channels,
        "config_hash": None,
        "encoder": {"name": encoder, "grid": grid, "width": model.in_channels},
        "class_names": _class_names(model.num_classes),
    }


def _converted(
    file: Path, config: TrainConfig, state: saved.RunState
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the files of the checkpoint folder in the order of the parts; sets the optimiser's groups of `state`."""
    with torch.device("meta"):
        model = TrajectoryTransformer(config.model)
    optimizer = MuonAdam(model.named_parameters(), config.optim)
    _, state.optimizer = saved.optimizer_tensors(optimizer)
    moments: dict[str, Tensor] = {}
    kept = ("params", official.AVERAGE, "opt_state")
    for name, content in official.read_parts(file, lambda name: name.startswith(kept)):
        if name == "params":
            yield saved.MODEL, official.from_official(model, content, file)
        elif name.startswith(official.AVERAGE):
            halflife = float(name.removeprefix(official.AVERAGE))
            yield f"ema-{halflife:g}.safetensors", official.from_official(model, content, file)
        elif name == "opt_state":
            moments = _moments(content, model, state.optimizer, file)
        del content  # before the next part is read
    yield saved.OPTIMIZER, moments
    yield saved.NORMALISER, {"mean": RAW.mean, "std": RAW.std}


def _moments(
    content: Mapping[str, Tensor], model: TrajectoryTransformer, groups: list[dict[str, Any]], file: Path
) -> dict[str, Tensor]:
    """Convert the optimiser's tensors to the names of our checkpoints; sets the number of updates in `groups`.

    A state without moments means a fresh optimiser. Raises MismatchError for the state of another optimiser.
    """
    if not content:
        return {}
    shapes = official.official_shapes(model)
    places: dict[str, str] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for group in groups:
        inner = STATE.format(rule=group["rule"])
        for slot, theirs in SLOTS[group["rule"]].items():
            for name in group["param_names"]:
                place = f"{inner}/{theirs}/{official.official_name(name)}"
                places[f"{slot}/{name}"], expected[place] = place, shapes[official.official_name(name)]
        try:
            group["step"] = official.count_of(content.get(f"{inner}/count"))
        except ValueError as error:
            raise MismatchError(
                f"{file}: opt_state is not that of Muon with Adam: {inner}/count, {error}"
            ) from None
    found = {place: content[place] for place in expected if place in content}
    check_weights(f"{file}: opt_state, expected that of Muon with Adam,", found, expected)
    return {name: official.turned(found[place]).float() for name, place in places.items()}


def _official_weights(folder: Path, ema: str | None, model: TrajectoryTransformer) -> dict[str, Any]:
    weights = saved.load_weights(folder, ema)
    name = saved.MODEL if ema is None else f"ema-{ema}.safetensors"
    check_weights(folder / name, weights, {name: p.shape for name, p in model.named_parameters()})
    return official.to_official(weights)


def _official_optimizer(
    folder: Path, state: saved.RunState, model: TrajectoryTransformer, config: TrainConfig
) -> dict[str, Any]:
    """Nest the optimiser's state as the release does: parameters of the other rule are empty maps."""
    tensors = saved.load_tensors(folder / saved.OPTIMIZER)
    if not tensors:
        return {}
    _, groups = saved.optimizer_tensors(MuonAdam(model.named_parameters(), config.optim))
    if [(g.keys(), g.get("param_names")) for g in state.optimizer] != [
        (g.keys(), g["param_names"]) for g in groups
    ]:
        raise MismatchError(f"{folder}: its optimiser is not that of Muon with Adam for this network")
    names = [name for group in state.optimizer for name in group["param_names"]]
    rules: dict[str, Any] = {}
    for group in state.optimizer:
        rule, own = group["rule"], set(group["param_names"])
        inner: dict[str, Any] = {"count": torch.tensor(group["step"], dtype=torch.int32)}
        if rule == "muon":
            inner["ns_coeffs"] = torch.tensor(NEWTON_SCHULZ)
        for slot, theirs in SLOTS[rule].items():
            moments: dict[str, Any] = {
                name: tensors[f"{slot}/{name}"] if name in own else {} for name in names
            }
            inner[theirs] = official.to_official(moments)
        rules[rule] = {"inner_state": {"0": inner, "1": {}, "2": {}}}
    return {"inner_states": rules}
