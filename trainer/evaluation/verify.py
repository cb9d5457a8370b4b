"""Read every file of a run folder and compare it with what vouches for it.

Each kind of file vouches for itself: JSON and trajectories by their seal, checkpoints by the sizes and checksums in
state.json, config.yaml by its first line, metrics.jsonl line by line, sheets by the checksums that PNG has. Files that
nothing reads again, and that a command makes anew, are not checked; they are listed with that command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hierarchy_builder.errors import TrainerError
from hierarchy_builder.files.exclusion import LOCK, of_exclusion
from hierarchy_builder.files.untrusted.documents import read_document
from hierarchy_builder.files.untrusted.pictures import PNG_START, png_chunks
from hierarchy_builder.files.whole import SEAL, parse_json
from trainer.data.tensor_files import check_tensor_seal, read_tensors
from trainer.training import checkpoint as saved
from trainer.training.log import METRICS, SAMPLES, TENSORBOARD, parse_metrics_line
from trainer.training.run_folder import CONFIG, read_config
from trainer.trajectories.file import read_trajectory

EARLIER = "an earlier release wrote it without a checksum"
UNSEALED = re.compile(r"[0-9a-f]{64}|[0-9a-f]{8}")
DERIVED = {
    ".html": "nothing reads it; `trainer report`, `sample` or the studio write it again",
    ".md": "nothing reads it; the studio writes it again",
}
"""Why files of these suffixes are not checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is to be said about one file: damage, or why it was not checked."""

    file: str
    is_damaged: bool
    text: str


def verify_run(run: Path) -> Iterator[Finding]:
    """Yield a finding for each file that is damaged or not checked; whole files give none.

    Raises TrainerError if `run` is neither a run folder nor a checkpoint.
    """
    if not (run / saved.STATE).is_file() and not (run / CONFIG).is_file():
        if not (run / "checkpoints").is_dir():
            raise TrainerError(
                f"{run} is not a run folder of `trainer train`: found no {CONFIG}, no checkpoints"
            )
        yield Finding(file=CONFIG, is_damaged=True, text="it is missing")
    for part in parts_of(run):
        yield from verify_part(run, part)


def parts_of(run: Path) -> list[Path]:
    """The checkpoints of a run, or the one at `run`, and all files outside of them."""
    if (run / saved.STATE).is_file():
        return [run]
    checkpoints = [path for path in saved.list_checkpoints(run) if path.is_dir()]
    files = (path for path in run.rglob("*") if path.is_file())
    return checkpoints + sorted(path for path in files if not any(c in path.parents for c in checkpoints))


def verify_part(run: Path, part: Path) -> Iterator[Finding]:
    """Yield what is to be said about one of `parts_of`."""
    if part.is_dir():
        yield from _checkpoint_findings(run, part)
        return
    place = part.relative_to(run)
    try:
        text, is_damaged = _unchecked(part, place), False
    except (ValueError, TrainerError, OSError) as error:
        text, is_damaged = str(error), True
    if text:
        yield Finding(file=str(place), is_damaged=is_damaged, text=text)


def _checkpoint_findings(run: Path, folder: Path) -> Iterator[Finding]:
    place = str(folder.relative_to(run))
    try:
        state = saved.load_state(folder)
    except TrainerError as error:
        yield Finding(file=place, is_damaged=True, text=str(error))
        return
    if state.format_version == 1:
        yield Finding(file=f"{place}/{saved.STATE}", is_damaged=False, text=EARLIER)
    if folder != run and saved.checkpoint_folder(run, state.step) != folder:
        yield Finding(file=place, is_damaged=True, text=f"it holds step {state.step}")
    for path in sorted(folder.iterdir()):
        file = f"{place}/{path.name}"
        if path.name in state.files:
            try:
                saved.load_tensors(path)
            except TrainerError as error:
                yield Finding(file=file, is_damaged=True, text=str(error))
        elif path.name != saved.STATE:
            yield Finding(file=file, is_damaged=False, text=f"{saved.STATE} does not list it")


def _unchecked(path: Path, place: Path) -> str | None:
    """Why a file was not checked; None for a whole one. Raises ValueError, TrainerError or OSError for damage."""
    if place.name == LOCK:
        if path.stat().st_size:
            raise ValueError("expected an empty file")
        return None
    if of_exclusion(place.parts[0]):
        return None
    if place.parts[0] == TENSORBOARD:
        return f"a copy of {METRICS} and {SAMPLES}/, with checksums that TensorBoard compares"
    if place.parts[0] == "checkpoints":
        return "it is not part of a checkpoint"
    check = CHECKS.get(place.name) or CHECKS.get(path.suffix)
    if check is None:
        return DERIVED.get(path.suffix, "it is not a file that a run writes")
    return check(path)


def _holds_checksum(values: Iterable[Any]) -> bool:
    """Whether a file without a seal has one, whose name is then damaged."""
    return any(isinstance(value, str) and UNSEALED.fullmatch(value) for value in values)


def _check_config(path: Path) -> str | None:
    read_config(path.parent)
    return None if path.read_bytes().startswith(b"#") else EARLIER


def _check_json(path: Path) -> str | None:
    content = parse_json(data := read_document(path))
    if SEAL.encode() in data:
        return None
    if _holds_checksum(content.values()):
        raise ValueError(f"a checksum under another name than {SEAL}")
    return EARLIER


def _check_metrics(path: Path) -> str | None:
    *lines, last = path.read_bytes().split(b"\n")
    rows = [parse_metrics_line(line) for line in lines]
    if bad := [number for number, row in enumerate(rows, start=1) if row is None]:
        raise ValueError(f"line {bad[0]} is damaged, of {len(lines)} lines; reports leave it out")
    if last:
        raise ValueError("its last line is not whole; training writes it again")
    if any(_holds_checksum(row.values()) for row in rows if row):
        raise ValueError("a line has its checksum under another name")
    return None if all(b'"crc32": ' in line for line in lines) else EARLIER


def _check_tensors(path: Path) -> str | None:
    _, text = read_tensors(path)
    if "format_version" in text:
        return None if read_trajectory(path) and SEAL in text else EARLIER
    if SEAL in text:
        check_tensor_seal(path, text[SEAL])
        return None
    if _holds_checksum(text.values()):
        raise ValueError(f"a checksum under another name than {SEAL}")
    return EARLIER


def _check_png(path: Path) -> str | None:
    """Compare the checksum of every chunk of a PNG, from its signature to its last byte."""
    data = path.read_bytes()
    if not data.startswith(PNG_START):
        raise ValueError("it is not a PNG")
    end, kind = len(PNG_START), b""
    for chunk in png_chunks(data):
        if not chunk.is_whole:
            raise ValueError(f"the chunk at byte {chunk.start} does not have its checksum")
        end, kind = chunk.start + len(chunk.content), chunk.kind
        if kind == b"IEND":
            break
    if kind != b"IEND" or end != len(data):
        raise ValueError("it does not end where a PNG ends")
    return None


CHECKS: dict[str, Callable[[Path], str | None]] = {
    CONFIG: _check_config,
    METRICS: _check_metrics,
    ".json": _check_json,
    ".png": _check_png,
    ".safetensors": _check_tensors,
}
"""Checks by name or suffix: each raises an error for damage, and returns why it could not tell."""
