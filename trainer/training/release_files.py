"""Reading the files of releases: a JSON configuration, named tensors, and the check that they fit the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.files.untrusted.documents import read_document
from hierarchy_builder.files.untrusted.pickles import check_pickle, check_sizes
from hierarchy_builder.files.whole import parse_json
from trainer.data.tensor_files import read_sealed


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a release's configuration file. Raises UsageError if it is not a JSON object."""
    try:
        return parse_json(read_document(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"configuration {path}: {error}; expected fields by name") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, on the CPU, from .safetensors or from a state dict saved by torch.

    Raises TrainerError if the file does not exist or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return read_sealed(path)
        check_pickle(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns about a pickle before it refuses it
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"found {type(content).__name__}, not names of tensors")
        check_sizes(path, content)
    except FileNotFoundError:
        raise TrainerError(f"weights {path} not found") from None
    except Exception as error:  # each format has its own errors
        reason = " ".join(str(error).partition(". ")[0].split())[:200] or type(error).__name__
        raise TrainerError(
            f"weights {path}: expected plain tensors, .pt or .safetensors: {reason}; copy the file again"
        ) from None
    return content


def check_weights(
    where: object,
    given: Mapping[str, Tensor],
    expected: Mapping[str, Sequence[int]],
    hint: Callable[[str, tuple[int, ...]], str] = lambda name, shape: "",
    advice: str = "",
) -> None:
    """Raise MismatchError, listing the first problems, unless `given` are finite weights of the `expected` shapes.

    hint: (name, shape found) → explanation of a wrong shape by the configuration, or "". Problems with an explanation
    are listed first. advice: what the message ends with, such as where such files are published.
    """
    problems = []
    for name, shape in expected.items():
        if problem := _problem(given.get(name), tuple(shape)):
            cause = hint(name, tuple(given[name].shape)) if "has shape" in problem else ""
            problems.append((not cause, f"{name} {problem}{cause and f' ({cause})'}"))
    problems += [(True, f"{name} has no place in the network") for name in given if name not in expected]
    if problems:
        lines = [line for _, line in sorted(problems, key=lambda problem: problem[0])]
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise MismatchError(
            f"{where} does not fit the network: {'; '.join(lines[:3])}{more}{advice and f'; {advice}'}"
        )


def _problem(tensor: Any, shape: tuple[int, ...]) -> str:
    if tensor is None:
        return "is missing"
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return "is no plain tensor"
    if tuple(tensor.shape) != shape:
        return f"has shape {tuple(tensor.shape)}, expected {shape}"
    if not tensor.is_floating_point():
        return f"is {str(tensor.dtype).removeprefix('torch.')}, expected floating-point numbers"
    return "" if tensor.isfinite().all() else "holds NaN or infinite values"
