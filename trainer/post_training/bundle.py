"""Mean and covariance of real images in files: npz, and the bundle of the release, which is a pickle.

A pickle can name any function and have it called while it is read. `ArraysOnly` resolves nothing but what rebuilds
arrays of NumPy, so that a bundle yields mappings of arrays or an error.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

from hierarchy_builder.errors import TrainerError
from trainer.metrics.frechet import Gaussian, gaussian_of, read_reference

ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),
}
"""What rebuilds an array, in files of NumPy 1 and 2: module and name. `encode` turns text into bytes."""


class ArraysOnly(pickle.Unpickler):
    """Reads mappings, sequences, numbers, texts and arrays of NumPy, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The function or type of that name, if it is one that rebuilds arrays."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def read_statistics(path: str | Path, entry: str | None = None) -> Gaussian:
    """Read the statistics of real images from an npz, or those called `entry` from the bundle of the release.

    Raises TrainerError for a file that holds anything else, or no such entry.
    """
    path = Path(path)
    if path.suffix not in (".pkl", ".pickle"):
        return read_reference(path)
    try:
        with open(path, "rb") as file:
            content = ArraysOnly(file).load()
    except Exception as error:  # a damaged pickle raises whatever its instructions end in
        raise TrainerError(f"reference statistics {path}: {error}; expected arrays of NumPy alone") from None
    if not isinstance(content, dict):
        raise TrainerError(
            f"reference statistics {path}: found {type(content).__name__}, expected names of files"
        )
    names = [str(name) for name in content]
    own = next((content[name] for name in content if Path(str(name)).name == entry), None)
    if not isinstance(own, dict):
        raise TrainerError(f"reference statistics {path}: holds {', '.join(names)}, expected {entry}")
    try:
        return gaussian_of(own)
    except ValueError as error:
        raise TrainerError(f"reference statistics {path}, {entry}: {error}") from None
