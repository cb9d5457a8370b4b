"""Runs at URLs: they are trained and read in a folder of this machine, and kept where their URL leads.

What lies at the URL counts. `fetched` makes the folder equal to it (of the checkpoints, the newest), and `send` copies
there what is new after every checkpoint: the files of a checkpoint first, its state.json last, then those that
training has removed go there too, their state.json first. A decoder or another run in a folder of the run is sent by
its own training alone; of it, only what is beside its checkpoints is fetched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from pathlib import Path

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files import remote
from hierarchy_builder.files.exclusion import is_taken, of_exclusion, still_ours
from hierarchy_builder.files.paths import a_folder
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import whole_file
from trainer.data.distant import default_cache
from trainer.training.checkpoint import STATE, STEP_FOLDER

CHECKPOINTS = "checkpoints"
OF_TRAINING = (CHECKPOINTS, "config.yaml", "metrics.jsonl", "tensorboard", "wandb")
"""What training alone writes and sends."""
TRIES = 3
_HOMES: dict[Path, Path] = {}
"""URLs of the folders of this process that stand for a run."""
_FETCHED: dict[Path, dict[str, tuple[int, int]]] = {}
"""Size and time of what was in such a folder, by name, when this process fetched it to read it."""
_SEEN: dict[Path, set[str]] = {}
"""Checkpoints that were in such a folder; those that are gone since were removed by training, others never came."""


def home_of(run: Path) -> Path | None:
    """Where a run is kept, if its folder only stands for it."""
    return _HOMES.get(run)


def run_folder(place: Path, is_new: bool = False, step: str = "") -> Path:
    """The folder of a run or of one of its checkpoints; for one at a URL the folder that stands for it, up to date.

    is_new: whether there may be nothing yet. step: a checkpoint that is wanted beside the newest. Raises UsageError
    where there is nothing.
    """
    if not is_remote(place):
        return place
    if STEP_FOLDER.fullmatch(place.name) and place.parent.name == CHECKPOINTS:
        checkpoint = run_folder(place.parents[1], step=place.name) / CHECKPOINTS / place.name
        if not checkpoint.exists():
            raise UsageError(f"{place} holds no whole checkpoint, of which a run keeps the newest few")
        return checkpoint
    name = hashlib.sha256(str(place).encode()).hexdigest()[:16]
    folder = default_cache() / "runs" / f"{name}-{place.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ranks of one machine share the folder
        # who trains in it now is ahead of what lies at the URL
        if not is_taken(folder) and not _fetched(place, folder, step) and not is_new:
            raise UsageError(f"{place} holds nothing, expected a run folder of `trainer train`")
    _HOMES[folder] = place
    if not is_new:
        _FETCHED[folder] = {name: _state(path) for name, path in _files(folder).items()}
    return folder


def named(path: Path) -> Path:
    """A path as the user knows it: one in a folder that stands for a run, at the URL of the run."""
    for folder, place in _HOMES.items():
        if path.is_relative_to(folder):
            return place / path.relative_to(folder).as_posix() if path != folder else place
    return path


def _fetched(place: Path, folder: Path, step: str) -> bool:
    """Do what `_fetch` does, again if what was listed was removed in the meantime: training replaces checkpoints."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return _fetch(place, folder, step)
    return _fetch(place, folder, step)


def _fetch(place: Path, folder: Path, step: str) -> bool:
    """Make a folder equal to what lies at a URL, of checkpoints the newest and `step`; whether anything does."""
    sizes = {name: size for name, size in _sizes(place).items() if f"/{CHECKPOINTS}/" not in name}
    steps = {name.split("/")[1] for name in sizes if name.startswith(f"{CHECKPOINTS}/")}
    whole = sorted(each for each in steps if f"{CHECKPOINTS}/{each}/{STATE}" in sizes)
    wanted = {*whole[-1:], *({step} & set(whole))}
    unwanted = {f"{CHECKPOINTS}/{each}" for each in steps - wanted}
    _SEEN[folder] = wanted
    for path in [path for path in (folder / CHECKPOINTS).glob("*") if path.name not in wanted]:
        shutil.rmtree(path)
    for name, size in sizes.items():
        if name.rpartition("/")[0] in unwanted:
            continue
        local = folder / name
        is_same = local.is_file() and local.stat().st_size == size
        if is_same and name.startswith(f"{CHECKPOINTS}/") and not name.endswith(STATE):
            continue
        with whole_file(local) as partial, partial.open("wb") as file, (place / name).open("rb") as source:
            shutil.copyfileobj(source, file, remote.PART_BYTES)
    return bool(sizes)


def send(folder: Path) -> None:
    """Copy to the URL of a run what is new in its folder, and remove there the checkpoints that are gone here."""
    place = _HOMES.get(folder)
    if place is None:
        return
    still_ours(place)
    there = _sizes(place)
    here = _files(folder)
    of_steps = {name for name in here if name.startswith(f"{CHECKPOINTS}/")}
    markers = {name for name in of_steps if name.endswith(f"/{STATE}")}
    for name in sorted(of_steps - markers):
        if f"{name.rpartition('/')[0]}/{STATE}" not in there:
            remote.send(here[name], place / name)
    still_ours(place)
    for name in sorted(markers):
        if name not in there:
            remote.send(here[name], place / name)
    for name in sorted(here.keys() - of_steps):
        if there.get(name) != here[name].stat().st_size or name.endswith((".yaml", ".jsonl", ".json")):
            remote.send(here[name], place / name)
    steps = {name.split("/")[1] for name in markers}
    removed = _SEEN[folder] - steps
    gone = [name for name in there if name.startswith(f"{CHECKPOINTS}/") and name.split("/")[1] in removed]
    remote.remove([place / name for name in gone if name.endswith(f"/{STATE}")])
    remote.remove([place / name for name in gone if not name.endswith(f"/{STATE}")])
    _SEEN[folder] = steps


def send_findings() -> None:
    """Copy to the URLs of runs what this process has written into their folders beside training, such as scores."""
    for folder, fetched in _FETCHED.items():
        for name, path in _files(folder).items():
            if name.partition("/")[0] not in OF_TRAINING and fetched.get(name) != _state(path):
                remote.send(path, _HOMES[folder] / name)
                fetched[name] = _state(path)


def _files(folder: Path) -> dict[str, Path]:
    """The files of a run by name."""
    nested = tuple(path.parent for path in folder.glob(f"*/{CHECKPOINTS}"))
    paths = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and not set(nested) & set(path.parents)
    ]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: path
        for name, path in names.items()
        if ".tmp-" not in name and not of_exclusion(name.partition("/")[0])
    }


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _sizes(place: Path) -> dict[str, int]:
    found = remote.files_below(place)
    names = {path.relative_to(place).as_posix(): size for path, size in found.items()}
    return {name: size for name, size in names.items() if not name.startswith(".")}


def a_run(text: str, is_new: bool = False) -> Path:
    """The folder of a run as a user names it: a path, or a URL."""
    return run_folder(a_folder(text), is_new)
