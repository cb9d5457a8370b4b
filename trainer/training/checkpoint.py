"""A run's state on disk: `checkpoints/step-00001234/`, written under another name and renamed when whole.

    model.safetensors       the raw weights
    ema-500.safetensors     one file for each weight average, named by its half-life in thousands of images
    optimizer.safetensors   tensors of the optimiser's state
    normaliser.safetensors  mean and spread of the features, so that sampling needs no shards
    state.json              step, images seen, configuration, encoder of the shards, sizes and checksums of the above

Everything random in a run is a function of (seed, step), so no generator state is kept. A checkpoint counts
when state.json, written last, is there and the files have the sizes it lists; a file's checksum is compared when
its tensors are read.

What is not a whole checkpoint of this program is never removed. Commands that only read pass over it with a warning;
training stops before it changes anything, because it would come to write in that place.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
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

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.files import partial_name, sync
from trainer.data.normalisation import RAW, Normaliser

STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
NORMALISER = "normaliser.safetensors"
ADVICE = "use another checkpoint, or move this one away and go on from the one before"
RETRY = "if that error may have passed, give the same command again"
FORMAT_VERSION = 1
"""Version of the checkpoint folder; readers refuse another."""
STEP_FOLDER = re.compile(r"step-(\d+)")
PARTIAL_FOLDER = re.compile(r"step-\d{8,}\.tmp-\d+")
OWN_FILE = re.compile(r"state\.json|(model|optimizer|normaliser|ema-[\w.+-]+)\.safetensors")


class ForeignCheckpointError(TrainerError):
    """A folder has the name of a checkpoint, but its content is not that of one."""


class UnreadableCheckpointError(TrainerError):
    """The system failed to read a checkpoint, which may be a passing error."""


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

    On any exception nothing of it is left. Raises TrainerError if `target` exists.
    """
    if os.path.lexists(target):
        raise TrainerError(f"{target} exists, nothing was written there; {_advice(target)}")
    partial = _vacant_partial(target)
    partial.mkdir(parents=True)
    try:
        for name, content in files:
            data = save({key: tensor.detach().contiguous().cpu() for key, tensor in content.items()})
            state.files[name], state.checksums[name] = len(data), f"{zlib.crc32(data):08x}"
            (partial / name).write_bytes(data)
            sync(partial / name)
            del content, data  # before the next file's tensors come
        (partial / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        sync(partial / STATE)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


def load_state(folder: Path) -> RunState:
    """state.json of a checkpoint folder.

    Raises MismatchError for another version, ForeignCheckpointError where the folder is not a checkpoint,
    UnreadableCheckpointError where the system cannot read it, and TrainerError where a file is damaged.
    """
    try:
        content = json.loads((folder / STATE).read_bytes())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise MismatchError(
                f"{folder}: checkpoint format {version}, this program reads {FORMAT_VERSION}: "
                "use the release that wrote it"
            )
        state = pydantic.TypeAdapter(RunState).validate_python(content)
        if lacking := {"encoder", "class_names", "config_hash"} - state.shards.keys():
            raise KeyError(*sorted(lacking))
        if not (isinstance(state.shards["encoder"], dict) and isinstance(state.shards["class_names"], list)):
            raise TypeError("shards.encoder must be a mapping, shards.class_names a list")
        sizes = {name: _size(folder / name) for name in state.files}
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ForeignCheckpointError(
            f"{folder} is not a checkpoint: {STATE}, {where}: {problem['msg']}"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise ForeignCheckpointError(f"{folder} is not a checkpoint: found no {STATE} in it") from None
    except (KeyError, TypeError) as error:
        raise ForeignCheckpointError(f"{folder} is not a checkpoint: {STATE}: {error!r}") from None
    except ValueError as error:
        raise TrainerError(f"{folder / STATE} is damaged: {error!r}; {_advice(folder)}") from None
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{error.filename or folder} cannot be read: {error}; {RETRY}"
        ) from None
    for name, size in state.files.items():
        if sizes[name] != size:
            raise TrainerError(
                f"{folder / name}: {sizes[name]} bytes, {STATE} says {size}; {_advice(folder)}"
            )
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises TrainerError when it cannot be read, or is not what the state.json beside it lists.
    """
    try:
        listed = _listed_checksum(path)
        if listed is not None and (found := _checksum(path)) != listed:
            raise TrainerError(
                f"{path}: its checksum is {found}, {STATE} says {listed}; {_advice(path.parent)}"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainerError(f"{path}: {error}; {_advice(path.parent)}") from None


def list_checkpoints(run: Path) -> list[Path]:
    """Whatever a run has under the name `checkpoints/step-<number>`, in the order of the numbers.

    Raises UnreadableCheckpointError where the folder cannot be listed: it may hold checkpoints.
    """
    try:
        names = os.listdir(run / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{run / 'checkpoints'} cannot be listed: {error}; {RETRY}, else use another folder"
        ) from None
    return sorted((run / "checkpoints" / n for n in names if STEP_FOLDER.fullmatch(n)), key=_number)


def latest_checkpoint(run: Path, damaged: list[TrainerError] | None = None) -> Path | None:
    """The newest checkpoint of a run that is whole, or None; what is wrong with newer ones goes to `damaged`."""
    found = _latest(run, [] if damaged is None else damaged)
    return found and found[0]


def _latest(run: Path, damaged: list[TrainerError]) -> tuple[Path, RunState] | None:
    for folder in reversed(list_checkpoints(run)):
        try:
            return folder, load_state(folder)
        except TrainerError as error:
            damaged.append(error)
    return None


def find_checkpoint(folder: str | Path, damaged: list[TrainerError] | None = None) -> Path:
    """The checkpoint folder meant by `folder`: itself, or the newest whole one of a run folder.

    damaged: see `latest_checkpoint`. Raises TrainerError when there is none.
    """
    path = Path(folder)
    return path if (path / STATE).exists() else _newest(path, [] if damaged is None else damaged)[0]


def read_checkpoint(folder: str | Path) -> tuple[Path, RunState]:
    """The checkpoint folder that `find_checkpoint` finds and its state, which is read once.

    Newer checkpoints that are damaged are named on stderr.
    """
    path, damaged = Path(folder), list[TrainerError]()
    if (path / STATE).exists():
        return path, load_state(path)
    found = _newest(path, damaged)
    warn_of(damaged, found[0])
    return found


def _newest(run: Path, damaged: list[TrainerError]) -> tuple[Path, RunState]:
    found = _latest(run, damaged)
    if found is not None:
        return found
    if steps := list_checkpoints(run):
        load_state(steps[-1])  # says what is wrong with it
    raise TrainerError(f"{run}: found no checkpoint; give a run folder of `trainer train` or one step of it")


def warn_of(damaged: Iterable[TrainerError], taken: Path) -> None:
    """Say on stderr which checkpoints were passed over, why, and what is `taken` instead."""
    for error in damaged:
        print(f"warning: {_problem(error)}; taking {taken.name} instead", file=sys.stderr)


def checkpoint_to_resume(run: Path) -> Path | None:
    """The newest checkpoint of a run, for training to go on from; None where there is no folder `step-*`.

    Raises MismatchError or TrainerError where the newest folder `step-*` is not a whole checkpoint.
    """
    unknown: dict[Path, TrainerError] = {}
    for folder in reversed(list_checkpoints(run)):
        try:
            _load_own(folder)
        except TrainerError as error:
            unknown[folder] = error
            continue
        _refuse(unknown, folder)
        return folder
    _refuse(unknown, None)
    return None


def later_checkpoints(run: Path, step: int, origin: Path | None) -> list[Path]:
    """Checkpoints of later steps than `step`, which training removes when it goes on from `origin`.

    Raises MismatchError or TrainerError where one of them is not a whole checkpoint, or holds anything else.
    """
    later = [folder for folder in list_checkpoints(run) if _number(folder) > step]
    unknown: dict[Path, TrainerError] = {}
    for folder in reversed(later):
        try:
            _check_removable(folder)
        except TrainerError as error:
            unknown[folder] = error
    _refuse(unknown, origin)
    return later


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
        raise TrainerError(f"{path}: found {', '.join(tensors)}, expected mean and std; {_advice(folder)}")
    return Normaliser(**tensors) if tensors else RAW


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, which belong to a course that was given up.

    Raises, before it removes anything, what `later_checkpoints` raises.
    """
    origin = checkpoint_folder(run, step) if step else None
    for folder in later_checkpoints(run, step, origin):
        _remove(folder)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes left behind.

    Whatever is not a whole checkpoint, or holds anything else, stays and does not count.
    """
    own = []
    for folder in list_checkpoints(run):
        with contextlib.suppress(TrainerError):
            _check_removable(folder)
            own.append(folder)
    for folder in own[:-keep]:
        _remove(folder)
    for folder in (run / "checkpoints").iterdir():
        if _is_partial(folder):
            shutil.rmtree(folder)


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


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _load_own(folder: Path) -> RunState:
    """Raises what `load_state` raises, and ForeignCheckpointError where the folder is named for another step."""
    state = load_state(folder)
    if state.step != _number(folder):
        raise ForeignCheckpointError(f"{folder} holds the checkpoint of another step, {state.step}")
    return state


def _check_removable(folder: Path) -> None:
    """Raise TrainerError unless the folder is a whole checkpoint and holds nothing else."""
    _load_own(folder)
    if folder.is_symlink():
        raise ForeignCheckpointError(f"{folder} is a link, which this program did not make")
    if strangers := _strangers(folder):
        raise ForeignCheckpointError(
            f"{folder} holds {', '.join(strangers)}, which is not part of a checkpoint"
        )


def _strangers(folder: Path) -> list[str]:
    """Names of all that is in a folder besides the files of a checkpoint."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not (entry.is_file(follow_symlinks=False) and OWN_FILE.fullmatch(entry.name))
            )
    except OSError as error:
        raise UnreadableCheckpointError(f"{folder} cannot be listed: {error}; {RETRY}") from None


def _is_partial(folder: Path) -> bool:
    """Whether a folder is what an interrupted write or removal left: by its name and by all that it holds."""
    if not PARTIAL_FOLDER.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    with contextlib.suppress(UnreadableCheckpointError):
        return not _strangers(folder)
    return False


def _vacant_partial(target: Path) -> Path:
    """The name under which this process writes or removes `target`, with nothing in that place."""
    partial = partial_name(target)
    if _is_partial(partial):  # of a process that was killed; in containers ids come again
        shutil.rmtree(partial)
    if os.path.lexists(partial):
        raise TrainerError(
            f"{partial} is not a checkpoint that was being written, and is in its place; move it away and give "
            f"the same command again: {_move(partial)}"
        )
    return partial


def _remove(folder: Path) -> None:
    """Remove a checkpoint. After a kill in between, the rest of it does not have the name of a checkpoint."""
    partial = _vacant_partial(folder)
    folder.rename(partial)
    shutil.rmtree(partial)


def _refuse(unknown: Mapping[Path, TrainerError], origin: Path | None) -> None:
    """Raise the error of the newest of the `unknown` folders, newest first, with what to do about all of them.

    origin: where training goes on once they are moved away.
    """
    if not unknown:
        return
    first = next(iter(unknown.values()))
    others = f" (and {len(unknown) - 1} more before it)" if len(unknown) > 1 else ""
    retry = f"{RETRY}; else " if isinstance(first, UnreadableCheckpointError) else ""
    then = "starts anew" if origin is None else f"goes on from {origin.name}"
    message = (
        f"{_problem(first)}{others}; nothing was changed: "
        f"{retry}train into another --out, or move {'it' if len(unknown) == 1 else 'them'} away, "
        f"and the same command {then}: "
        f"{' && '.join(map(_move, unknown))}"
    )
    is_foreign = isinstance(first, ForeignCheckpointError | MismatchError)
    raise (MismatchError if is_foreign else TrainerError)(message)


def _problem(error: TrainerError) -> str:
    """What an error of `load_state` says, without the advice."""
    return re.split(f"; (?:{ADVICE}|{RETRY})", str(error))[0]


def _advice(folder: Path) -> str:
    return f"{ADVICE}: {_move(folder)}"


def _move(folder: Path) -> str:
    """The shell command that gives a folder a name beside it which no checkpoint has."""
    names = (folder.with_name(f"{folder.name}.aside{number}") for number in ("", *range(2, 1000)))
    target = next(path for path in names if not os.path.lexists(path))
    return shlex.join(["mv", "--", str(folder), str(target)])


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
