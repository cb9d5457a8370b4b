"""Checkpoints of a run: folders `checkpoints/step-00001234/`, written under another name and renamed when complete.

    model.safetensors       the raw weights
    ema-500.safetensors     one file for each weight average, named by its half-life in thousands of images
    optimizer.safetensors   tensors of the optimiser's state
    statistics.safetensors  of post-training: the moments of earlier samples
    normaliser.safetensors  mean and standard deviation of the features, so that sampling needs no shards
    state.json              step, images seen, configuration, encoder of the shards, sizes and checksums of these files

All random numbers of a run depend only on (seed, step), so no generator state is stored. A checkpoint is complete if
state.json, which is written last, exists and all files have the sizes it lists; the checksum of a file is compared
when its tensors are read, that of state.json itself whenever it is read.

A folder that is not a complete checkpoint of this program is never removed. Commands that only read skip it with a
warning; training stops before it changes anything, because it might later have to write to that path.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from safetensors.torch import save
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.fields import MOST, STRICT, brief
from hierarchy_builder.files.untrusted.documents import read_document
from hierarchy_builder.files.whole import parse_json, partial_name, sealed_text, size_on_disk, sync
from hierarchy_builder.terminal import say
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.tensor_files import read_tensors

STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
NORMALISER = "normaliser.safetensors"
STATISTICS = "statistics.safetensors"
ADVICE = "use another checkpoint, or move this one away and continue from the one before"
RETRY = "if that error may have passed, give the same command again"
FORMAT_VERSION = 2
"""Version of the checkpoint format. Version 1 had no checksum of state.json; other versions are refused."""
READABLE = (1, 2)
STEP_FOLDER = re.compile(r"step-(\d+)")
PARTIAL_FOLDER = re.compile(r"step-\d{8,}\.tmp-\d+")
OWN_FILE = re.compile(r"state\.json|(model|optimizer|normaliser|statistics|ema-[\w.+-]+)\.safetensors")


class ForeignCheckpointError(TrainerError):
    """A folder is named like a checkpoint, but its content is not a checkpoint."""


class UnreadableCheckpointError(TrainerError):
    """The operating system could not read a checkpoint; the error may be transient."""


@dataclass(kw_only=True, slots=True)
class RunState:
    """Content of state.json: everything in a checkpoint except tensors."""

    __repr__ = brief

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    step: Annotated[int, pydantic.Field(ge=0)]
    images_seen: Annotated[int, pydantic.Field(ge=0)]
    config: dict[str, Any]
    """Every field of the run's configuration."""
    shards: dict[str, Any]
    """Encoder, class names, grid and configuration hash of the shards."""
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
    """CRC-32 of each other file in eight hexadecimal digits; empty in checkpoints of earlier releases."""
    format_version: int = FORMAT_VERSION


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step` in a run folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    target: Path,
    state: RunState,
    model: torch.nn.Module,
    averages: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    normaliser: Normaliser = RAW,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the checkpoint folder `target`, which appears under this name only when it is complete.

    averages: weights by half-life, for example {"500": {...}}. more: further tensors by file name.
    """
    tensors, state.optimizer = optimizer_tensors(optimizer)
    files = {
        MODEL: dict(model.state_dict()),
        OPTIMIZER: tensors,
        NORMALISER: {"mean": normaliser.mean, "std": normaliser.std},
    }
    files.update({name: dict(content) for name, content in (more or {}).items()})
    files.update({f"ema-{name}.safetensors": dict(weights) for name, weights in averages.items()})
    write_folder(target, state, files.items())


def write_folder(target: Path, state: RunState, files: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Write the checkpoint folder `target` from tensors by file name, one file in memory at a time.

    If an exception is raised, nothing is left on disk. Raises TrainerError if `target` exists.
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
            del content, data  # frees memory before the next file's tensors are loaded
        (partial / STATE).write_bytes(sealed_text(asdict(state), sort_keys=False))
        sync(partial / STATE)
        sync(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


def load_state(folder: Path) -> RunState:
    """Read state.json of a checkpoint folder and compare the sizes of all files.

    Raises MismatchError for another format version, ForeignCheckpointError if the folder is not a checkpoint,
    UnreadableCheckpointError if the operating system cannot read it, and TrainerError if a file is damaged.
    """
    try:
        content = _read_state(folder)
        version = content["format_version"]
        if version not in READABLE:
            raise MismatchError(
                f"{folder}: checkpoint format {version}, this program reads {FORMAT_VERSION} and older: "
                "use the release that wrote it"
            )
        state = pydantic.TypeAdapter(RunState).validate_python(content)
        if lacking := {"encoder", "class_names", "config_hash"} - state.shards.keys():
            raise KeyError(*sorted(lacking))
        if not (isinstance(state.shards["encoder"], dict) and isinstance(state.shards["class_names"], list)):
            raise TypeError("shards.encoder must be a mapping, shards.class_names a list")
        known = state.shards.get("classes") or []
        if not (isinstance(known, list) and all(type(n) is int and 0 <= n < MOST for n in known)):
            raise TypeError("shards.classes must be a list of labels")
        if version > 1 and state.files.keys() != state.checksums.keys():
            raise ValueError("not every file has a size and a checksum")
        for name, size in state.files.items():
            if not OWN_FILE.fullmatch(name):
                raise ValueError(f"{name!r} is no file of a checkpoint")
            if (found := size_on_disk(folder / name)) != size:
                raise TrainerError(f"{folder / name}: {found} bytes, {STATE} says {size}; {_advice(folder)}")
        return state
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        reason = f"{STATE}, {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (FileNotFoundError, NotADirectoryError):
        reason = f"found no {STATE} in it"
    except (KeyError, TypeError) as error:
        reason = f"{STATE}: {error!r}"
    except ValueError as error:
        raise TrainerError(f"{folder / STATE} is damaged: {error!r}; {_advice(folder)}") from None
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{error.filename or folder} cannot be read: {error}; {RETRY}"
        ) from None
    raise ForeignCheckpointError(f"{folder} is not a checkpoint: {reason}")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU.

    Raises TrainerError if it cannot be read, or its checksum is not the one in state.json of the same folder.
    """
    try:
        listed = _listed_checksum(path)
        if listed is not None and (found := _checksum(path)) != listed:
            raise TrainerError(
                f"{path}: its checksum is {found}, {STATE} says {listed}; {_advice(path.parent)}"
            )
        return read_tensors(path)[0]
    except (OSError, ValueError) as error:
        raise TrainerError(f"{path}: {error}; {_advice(path.parent)}") from None


def list_checkpoints(run: Path) -> list[Path]:
    """List all paths `checkpoints/step-<number>` of a run, whatever they are, in the order of the numbers.

    Raises UnreadableCheckpointError if the folder cannot be listed, because it may hold checkpoints.
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


def _search(
    run: Path, read: Callable[[Path], RunState]
) -> tuple[tuple[Path, RunState] | None, dict[Path, TrainerError]]:
    """Return a run's newest folder `step-*` that `read` accepts, and the errors for all newer ones, newest first."""
    refused: dict[Path, TrainerError] = {}
    for folder in reversed(list_checkpoints(run)):
        try:
            return (folder, read(folder)), refused
        except TrainerError as error:
            refused[folder] = error
    return None, refused


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    found, _ = _search(run, load_state)
    return found and found[0]


def find_checkpoint(folder: str | Path, warn: bool = False) -> Path:
    """Return `folder` if it is a checkpoint, or the newest complete checkpoint of the run folder `folder`.

    warn: name newer checkpoints that are damaged on stderr. Raises TrainerError if there is none.
    """
    path = Path(folder)
    return path if (path / STATE).exists() else read_checkpoint(path, warn)[0]


def read_checkpoint(folder: str | Path, warn: bool = True) -> tuple[Path, RunState]:
    """Return the checkpoint folder that `find_checkpoint` finds, and its state, which is read once."""
    run = Path(folder)
    if (run / STATE).exists():
        return run, load_state(run)
    found, refused = _search(run, load_state)
    if found is None:
        for error in refused.values():
            raise error  # the error of the newest folder
        if any((run / name).exists() for name in ("manifest.json", "index.json")):
            advice = f"it holds hierarchies, from which `trainer train {run} --out RUN` makes a run"
        else:
            advice = "give a run folder of `trainer train` or one step of it"
        raise TrainerError(f"{run}: found no checkpoint; {advice}")
    for error in refused.values() if warn else ():
        say(f"warning: {_problem(error)}; taking {found[0].name} instead")
    return found


def checkpoint_to_resume(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, from which training continues; None if there is no folder `step-*`.

    Raises MismatchError or TrainerError if the newest folder `step-*` is not a complete checkpoint.
    """
    found, refused = _search(run, _load_own)
    origin = found and found[0]
    _refuse(refused, origin)
    return origin


def later_checkpoints(run: Path, step: int, origin: Path | None) -> list[Path]:
    """List the checkpoints after `step`, which training removes when it continues from `origin`.

    Raises MismatchError or TrainerError if one of them is not a complete checkpoint, or contains other files.
    """
    later = [folder for folder in list_checkpoints(run) if _number(folder) > step]
    _refuse(_unremovable(reversed(later)), origin)
    return later


def run_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint; a checkpoint outside a run folder is returned itself."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint


def averages_of(folder: Path) -> list[str]:
    """List the half-lives of the weight averages in a checkpoint, as in their file names, shortest first."""
    names = [p.stem.removeprefix("ema-") for p in folder.glob("ema-*.safetensors")]
    return sorted(names, key=float)


def load_weights(folder: Path, ema: str | None) -> dict[str, Tensor]:
    """Read the weight average of half-life `ema`, or the raw weights if `ema` is None.

    Raises UsageError with the available half-lives for an unknown one, MismatchError for a Gaussian
    start of an earlier version.
    """
    if ema is not None and ema not in averages_of(folder):
        known = ", ".join(averages_of(folder)) or "none"
        raise UsageError(
            f"{folder}: no weight average of half-life {ema} kimg, there are {known}; or use raw"
        )
    weights = load_tensors(folder / (MODEL if ema is None else f"ema-{ema}.safetensors"))
    starts = [name.removesuffix("deviation") for name in weights if name.endswith("start.deviation")]
    if any(f"{start}spread" not in weights for start in starts):
        raise MismatchError(
            f"{folder}: an earlier version trained this network, and its Gaussian start (model.start) was another one: "
            "train it again, with `trainer train SHARDS --out RUN` into a new folder"
        )
    return weights


def load_normaliser(folder: Path) -> Normaliser:
    """Read the normaliser of a checkpoint; checkpoints of earlier releases have none and use raw features."""
    path = folder / NORMALISER
    tensors = load_tensors(path) if path.exists() else {}
    if not tensors.keys() <= {"mean", "std"}:
        raise TrainerError(f"{path}: found {', '.join(tensors)}, expected mean and std; {_advice(folder)}")
    return Normaliser(**tensors) if tensors else RAW


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`, so that the run continues from there.

    Raises what `later_checkpoints` raises, before anything is removed.
    """
    origin = checkpoint_folder(run, step) if step else None
    for folder in later_checkpoints(run, step, origin):
        _remove(folder)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes left behind.

    Folders that are not complete checkpoints, or contain other files, are kept and not counted.
    """
    folders = list_checkpoints(run)
    foreign = _unremovable(folders)
    for folder in [folder for folder in folders if folder not in foreign][:-keep]:
        _remove(folder)
    for folder in (run / "checkpoints").iterdir():
        if _is_partial(folder):
            shutil.rmtree(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state of an optimiser: tensors by name `<slot>/<parameter>`, and its groups as plain data."""
    groups = optimizer.param_groups
    tensors = {
        f"{slot}/{name}": tensor
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }
    return tensors, [{k: v for k, v in group.items() if k != "params"} for group in groups]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore the state that `optimizer_tensors` returned. Raises MismatchError if the parameters differ."""
    names = [group["param_names"] for group in optimizer.param_groups]
    state: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        slot, _, name = path.partition("/")
        state.setdefault(name, {})[slot] = tensor
    if names != [group.get("param_names") for group in groups] or not state.keys() <= set().union(*names):
        raise MismatchError("the checkpoint's optimiser holds other parameters than the model")
    merged = [{**group, "params": group["param_names"]} for group in groups]  # torch takes any identifiers
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _load_own(folder: Path) -> RunState:
    """Raise what `load_state` raises, and ForeignCheckpointError if the folder is named for another step."""
    state = load_state(folder)
    if state.step != _number(folder):
        raise ForeignCheckpointError(f"{folder} holds the checkpoint of another step, {state.step}")
    return state


def _unremovable(folders: Iterable[Path]) -> dict[Path, TrainerError]:
    """Return those folders that are not complete checkpoints, or contain other files, and why."""
    errors: dict[Path, TrainerError] = {}
    for folder in folders:
        try:
            _load_own(folder)
            if folder.is_symlink():
                raise ForeignCheckpointError(f"{folder} is a symbolic link, which this program did not make")
            if strangers := _strangers(folder):
                raise ForeignCheckpointError(
                    f"{folder} holds {', '.join(strangers)}, which is not part of a checkpoint"
                )
        except TrainerError as error:
            errors[folder] = error
    return errors


def _strangers(folder: Path) -> list[str]:
    """List the names in a folder that are not files of a checkpoint."""
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
    """Whether a folder is left from an interrupted write or removal, judging by its name and all its files."""
    if not PARTIAL_FOLDER.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    with contextlib.suppress(UnreadableCheckpointError):
        return not _strangers(folder)
    return False


def _vacant_partial(target: Path) -> Path:
    """Return the path under which this process writes or removes `target`, after making sure that it is free."""
    partial = partial_name(target)
    if _is_partial(partial):  # from a killed process; in containers process ids repeat
        shutil.rmtree(partial)
    if os.path.lexists(partial):
        raise TrainerError(
            f"{partial} is in the way and is not a checkpoint that was being written; move it away and give "
            f"the same command again: {_move(partial)}"
        )
    return partial


def _remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a partly removed one is never taken for a checkpoint."""
    partial = _vacant_partial(folder)
    folder.rename(partial)
    shutil.rmtree(partial)


def _refuse(unknown: Mapping[Path, TrainerError], origin: Path | None) -> None:
    """Raise the first error of `unknown` (folders, newest first), with a command that moves all of them away.

    origin: the checkpoint from which training continues once they are moved; None if it starts from scratch.
    """
    if not unknown:
        return
    first = next(iter(unknown.values()))
    others = f" (and {len(unknown) - 1} more before it)" if len(unknown) > 1 else ""
    retry = f"{RETRY}; else " if isinstance(first, UnreadableCheckpointError) else ""
    then = "starts from scratch" if origin is None else f"continues from {origin.name}"
    message = (
        f"{_problem(first)}{others}; nothing was changed: "
        f"{retry}train into another --out, or move {'it' if len(unknown) == 1 else 'them'} away, "
        f"and the same command {then}: "
        f"{' && '.join(map(_move, unknown))}"
    )
    is_foreign = isinstance(first, ForeignCheckpointError | MismatchError)
    raise (MismatchError if is_foreign else TrainerError)(message)


def _problem(error: TrainerError) -> str:
    """Return the message of an error of `load_state` without the advice at its end."""
    return re.split(f"; (?:{ADVICE}|{RETRY})", str(error))[0]


def _advice(folder: Path) -> str:
    return f"{ADVICE}: {_move(folder)}"


def _move(folder: Path) -> str:
    """Return the shell command that renames a folder, in the same place, to a name no checkpoint has."""
    names = (folder.with_name(f"{folder.name}.aside{number}") for number in ("", *range(2, 1000)))
    target = next(path for path in names if not os.path.lexists(path))
    return shlex.join(["mv", "--", str(folder), str(target)])


def _listed_checksum(path: Path) -> str | None:
    """Return the checksum of a file in state.json of its folder; None without such a file or entry."""
    try:
        content = _read_state(path.parent)
        listed: str | None = content.get("checksums", {}).get(path.name)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise TrainerError(f"{path.parent} is not a checkpoint: {STATE}: {error!r}") from None
    if listed is None and content.get("format_version") != 1:
        raise TrainerError(f"{path}: {STATE} lists no such file; {_advice(path.parent)}")
    return listed


def _read_state(folder: Path) -> dict[str, Any]:
    """Read state.json, which is sealed since version 2. Raises ValueError if it is damaged."""
    data = read_document(folder / STATE)
    content = parse_json(data)
    return parse_json(data, sealed=True) if content.get("format_version") == FORMAT_VERSION else content


def _checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return f"{value:08x}"
