"""A trajectory as a safetensors file: `levels`, `seeds`, `replaced.0` … as tensors, the rest as JSON beside them.

    L levels, H×W grid of tokens, C channels

What is read is checked as a whole, so that any edit of it can be drawn, shown and undone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.files.untrusted.documents import parse_json
from hierarchy_builder.files.whole import SEAL, write_bytes
from trainer.data.tensor_files import check_tensor_seal, read_tensors, tensor_bytes

FORMAT_VERSION = "2"
"""Version of a trajectory file. Version 1 had no checksum of the file; readers refuse others."""
READABLE = ("1", "2")


@dataclass(kw_only=True)
class Entries:
    """Fields of a trajectory that the file holds as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    label: Annotated[int, Field(ge=0)]
    class_name: str
    num_steps: Annotated[int, Field(ge=1)]
    guidance: tuple[float, float, float] | None
    weak_scale: float
    # Files of earlier versions have no temperature.
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    encoder: dict[str, Any]
    origin: dict[str, Any]
    model: dict[str, str]
    history: list[dict[str, Any]]


ENTRIES = tuple(field.name for field in fields(Entries))


def write_trajectory(
    path: Path, levels: Tensor, seeds: Sequence[int], replaced: Sequence[Tensor], entries: Mapping[str, Any]
) -> None:
    """Write the file, whole or not at all; the folder of the model in `entries` becomes relative to it."""
    if folder := entries["model"].get("folder"):
        relative = os.path.relpath(folder, path.resolve().parent)
        entries = {**entries, "model": {**entries["model"], "folder": relative}}
    metadata = {name: json.dumps(value) for name, value in entries.items()}
    before = {f"replaced.{number}": tensor.contiguous() for number, tensor in enumerate(replaced)}
    tensors = {"levels": levels.contiguous(), "seeds": torch.tensor(seeds), **before}
    write_bytes(path, tensor_bytes(tensors, {"format_version": FORMAT_VERSION, **metadata}))


def read_trajectory(path: Path) -> dict[str, Any]:
    """What `write_trajectory` wrote, by field: levels float32 [L, H, W, C], seeds, replaced and the entries.

    Raises TrainerError if it is no trajectory or its parts do not fit together, MismatchError for its version.
    """
    try:
        tensors, metadata = read_tensors(path)
        found, seal = metadata.pop("format_version", None), metadata.pop(SEAL, None)
        if found is None:
            raise ValueError("it has no format_version")
        if found not in READABLE:
            raise MismatchError(
                f"{path}: trajectory format {found}, this program reads {' and '.join(READABLE)}"
            )
        if seal is not None or found == FORMAT_VERSION:
            check_tensor_seal(path, seal)
        entries = _checked({name: parse_json(value) for name, value in metadata.items()})
        replaced = [tensors[f"replaced.{number}"] for number in range(len(tensors) - 2)]
        levels, seeds = tensors["levels"], tensors["seeds"]
        _check_tensors(levels, seeds, replaced, entries.history)
        if folder := entries.model.get("folder"):
            entries.model["folder"] = str((path.resolve().parent / folder).resolve())
    except (OSError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise TrainerError(
            f"{path} is not a trajectory: {what}; expected a file of `trainer sample`, `encode` or `edit`"
        ) from None
    return {"levels": levels, "seeds": tuple(seeds.tolist()), "replaced": replaced, **vars(entries)}


def _checked(found: dict[str, Any]) -> Entries:
    try:
        return TypeAdapter(Entries).validate_python(found)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _check_tensors(
    levels: Tensor, seeds: Tensor, replaced: list[Tensor], history: list[dict[str, Any]]
) -> None:
    """Raise ValueError or KeyError unless they fit each other."""
    if levels.ndim != 4 or levels.dtype != torch.float32 or not levels.numel() or not levels.isfinite().all():
        shape = list(levels.shape)
        raise ValueError(f"its levels are {levels.dtype} {shape}, expected finite float32 [L, H, W, C]")
    if seeds.dtype != torch.int64 or seeds.shape != levels.shape[:1]:
        raise ValueError(f"its {len(levels)} levels have {list(seeds.shape)} seeds of {seeds.dtype}")
    steps = [entry for entry in history if "first_level" in entry]
    if len(steps) != len(replaced):
        raise ValueError(f"its history has {len(steps)} steps, which replaced {len(replaced)} tensors")
    for entry, before in zip(steps, replaced, strict=True):
        start, num_seeds = int(entry["first_level"]), len(entry["seeds_before"])
        is_inside = (
            before.ndim == 4 and before.dtype == levels.dtype and 0 <= start <= len(levels) - len(before)
        )
        if not is_inside or before.shape[1:] != levels.shape[1:] or num_seeds != len(levels):
            raise ValueError("its history does not fit its levels")
