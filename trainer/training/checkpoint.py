"""A run's state on disk: `checkpoints/step-00001234/`, written under another name and renamed when whole.

    model.safetensors       the raw weights
    ema-500.safetensors     one file for each weight average, named by its half-life in thousands of images
    optimizer.safetensors   tensors of the optimiser's state
    normaliser.safetensors  mean and spread of the features, so that sampling needs no shards
    state.json              step, images seen, configuration, encoder of the shards, sizes and checksums of the above

Everything random in a run is a function of (seed, step), so no generator state is kept. A checkpoint counts
when state.json, written last, is there and the files have the sizes it lists; a file's checksum is compared when
its tensors are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from trainer.data.normalisation import RAW, Normaliser
from trainer.errors import MismatchError, TrainerError, UsageError

STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
NORMALISER = "normaliser.safetensors"
ADVICE = "use another checkpoint, or remove this one and go on from the one before"
FORMAT_VERSION = 1
"""Version of the checkpoint folder; readers refuse another."""


@dataclass(kw_only=True, slots=True)
class RunState:
    """What a checkpoint knows besides tensors, as plain data."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    step: Annotated[int, pydantic.Field(ge=0)]
    images_seen: Annotated[int, pydantic.Field(ge=0)]
    config: dict[str, Any]
    """The resolved TrainConfig."""
    shards: dict[str, Any]
    """Description of the shards: encoder, class names, grid, configuration hash."""
    seconds: float = 0.0
    """Time spent training so far."""
    loss: float | None = None
    """Loss in the last line of metrics.jsonl."""
    log: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of metrics.jsonl."""
    optimizer: list[dict[str, Any]] = field(default_factory=list)
    """The optimiser's parameter groups without tensors."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each other file."""
    checksums: dict[str, str] = field(default_factory=dict)
    """CRC-32 of each other file, eight hexadecimal digits; checkpoints of earlier releases have none."""
    format_version: int = FORMAT_VERSION


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    target: Path,
    state: RunState,
    model: torch.nn.Module,
    averages: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    normaliser: Normaliser = RAW,
) -> None:
    """Write the checkpoint folder `target`; an unfinished one never bears that name.

    averages: weights by half-life, for example {"500": {...}}.
    """
    tensors, state.optimizer = optimizer_tensors(optimizer)
    files = {
        MODEL: dict(model.state_dict()),
        OPTIMIZER: tensors,
        NORMALISER: {"mean": normaliser.mean, "std": normaliser.std},
    }
    files.update({f"ema-{name}.safetensors": dict(weights) for name, weights in averages.items()})
    write_folder(target, state, files.items())


def write_folder(target: Path, state: RunState, files: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Write the checkpoint folder `target` from tensors by file name, one file in memory at a time.

    On any exception nothing of it is left.
    """
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    if partial.exists():  # of a process that was killed; in containers ids come again
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        for name, content in files:
            data = save({key: tensor.detach().contiguous().cpu() for key, tensor in content.items()})
            state.files[name], state.checksums[name] = len(data), f"{zlib.crc32(data):08x}"
            _write(partial / name, data)
            del content, data  # before the next file's tensors come
        _write(partial / STATE, json.dumps(asdict(state), indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def load_state(folder: Path) -> RunState:
    """state.json of a checkpoint folder.

    Raises TrainerError when it is missing, unreadable, or a file beside it has not the size it lists.
    """
    try:
        content = json.loads((folder / STATE).read_bytes())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise MismatchError(f"{folder}: checkpoint format {version}, this program reads {FORMAT_VERSION}")
        state = pydantic.TypeAdapter(RunState).validate_python(content)
        if lacking := {"encoder", "class_names", "config_hash"} - state.shards.keys():
            raise KeyError(*sorted(lacking))
        if not (isinstance(state.shards["encoder"], dict) and isinstance(state.shards["class_names"], list)):
            raise TypeError("shards.encoder must be a mapping, shards.class_names a list")
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise TrainerError(f"{folder} is not a checkpoint: {STATE}, {where}: {problem['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{folder} is not a checkpoint: {STATE}: {error!r}") from None
    for name, size in state.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise TrainerError(f"{path}: {found} bytes, {STATE} says {size}; {ADVICE}")
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises TrainerError when it cannot be read, or is not what the state.json beside it lists.
    """
    try:
        listed = _listed_checksum(path)
        if listed is not None and (found := _checksum(path)) != listed:
            raise TrainerError(f"{path}: its checksum is {found}, {STATE} says {listed}; {ADVICE}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainerError(f"{path}: {error}; {ADVICE}") from None


def list_checkpoints(run: Path) -> list[Path]:
    """Folders `checkpoints/step-*` of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(f for f in folders if re.fullmatch(r"step-\d+", f.name))


def latest_checkpoint(run: Path, damaged: list[TrainerError] | None = None) -> Path | None:
    """The newest checkpoint of a run that is whole, or None; what is wrong with newer ones goes to `damaged`."""
    for folder in reversed(list_checkpoints(run)):
        try:
            load_state(folder)
        except TrainerError as error:
            if damaged is not None:
                damaged.append(error)
            continue
        return folder
    return None


def find_checkpoint(folder: str | Path, damaged: list[TrainerError] | None = None) -> Path:
    """The checkpoint folder meant by `folder`: itself, or the newest whole one of a run folder.

    damaged: see `latest_checkpoint`. Raises TrainerError when there is none.
    """
    path = Path(folder)
    if (path / STATE).exists():
        return path
    found = latest_checkpoint(path, damaged)
    if found is None:
        if steps := list_checkpoints(path):
            load_state(steps[-1])  # says what is wrong with it
        raise TrainerError(
            f"{path}: found no checkpoint; give a run folder of `trainer train` or one step of it"
        )
    return found


def warn_of(damaged: Iterable[TrainerError], taken: Path | None) -> None:
    """Say on stderr which checkpoints were passed over, why, and what is `taken` instead; None: a new start."""
    instead = "nothing before it is whole, starting anew" if taken is None else f"taking {taken.name} instead"
    for error in damaged:
        print(f"warning: {str(error).removesuffix(f'; {ADVICE}')}; {instead}", file=sys.stderr)


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder belongs to; one that lies elsewhere is its own."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint


def averages_of(folder: Path) -> list[str]:
    """Half-lives of the weight averages in a checkpoint, as their files name them, shortest first."""
    names = [p.stem.removeprefix("ema-") for p in folder.glob("ema-*.safetensors")]
    return sorted(names, key=float)


def load_weights(folder: Path, ema: str | None) -> dict[str, Tensor]:
    """Weights of the average with half-life `ema`, or the raw ones for None.

    Raises UsageError naming the averages there are.
    """
    if ema is None:
        return load_tensors(folder / MODEL)
    if ema not in averages_of(folder):
        known = ", ".join(averages_of(folder)) or "none"
        raise UsageError(
            f"{folder}: no weight average of half-life {ema} kimg, there are {known}; or use raw"
        )
    return load_tensors(folder / f"ema-{ema}.safetensors")


def load_normaliser(folder: Path) -> Normaliser:
    """The normaliser of a checkpoint; one of earlier releases holds none and has raw features."""
    path = folder / NORMALISER
    tensors = load_tensors(path) if path.exists() else {}
    if not tensors.keys() <= {"mean", "std"}:
        raise TrainerError(f"{path}: found {', '.join(tensors)}, expected mean and std; {ADVICE}")
    return Normaliser(**tensors) if tensors else RAW


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, damaged or of a course that was given up."""
    for folder in list_checkpoints(run):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes left behind."""
    for folder in list_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(leftover)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State of an optimiser over named parameters: tensors as `<slot>/<parameter>`, and its groups as plain data."""
    state = optimizer.state_dict()
    names = _parameter_names(state["param_groups"])
    tensors = {
        f"{slot}/{names[number]}": tensor
        for number, slots in state["state"].items()
        for slot, tensor in slots.items()
    }
    return tensors, [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Put back what `optimizer_tensors` returned. Raises MismatchError for another set of parameters."""
    own = optimizer.state_dict()["param_groups"]
    names = [group["param_names"] for group in own]
    stored = {path.partition("/")[2] for path in tensors}
    if names != [group.get("param_names") for group in groups] or not stored <= set().union(*names):
        raise MismatchError("the checkpoint's optimiser holds other parameters than the model")
    numbers = {name: number for number, name in _parameter_names(own).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        slot, _, name = path.partition("/")
        state.setdefault(numbers[name], {})[slot] = tensor
    merged = [{**saved, "params": mine["params"]} for saved, mine in zip(groups, own, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _parameter_names(groups: list[dict[str, Any]]) -> dict[int, str]:
    return {n: name for g in groups for n, name in zip(g["params"], g["param_names"], strict=True)}


def _listed_checksum(path: Path) -> str | None:
    """What state.json says of a file beside it; None where there is none or it does not say."""
    try:
        content = json.loads((path.parent / STATE).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TrainerError(f"{path.parent} is not a checkpoint: {STATE}: {error!r}") from None
    return content.get("checksums", {}).get(path.name)


def _checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
