"""Imports timm and torchvision, also where torchvision's compiled library cannot be loaded.

torchvision registers fake kernels for `nms` and `qnms` while it is imported, and timm imports torchvision. When the
compiled library was built for CUDA and the installed torch was not, the library fails to load, nothing declares
these operators, and the import ends in `RuntimeError: operator torchvision::nms does not exist`. Declaring the two
schemas is enough, since this project calls no operator of torchvision. Where the library loads, it declares them
itself and nothing is done here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []
"""Keeps the declarations alive, since they end with the object."""


def import_vision(module: str) -> ModuleType:
    """The module called `module`, such as `timm` or `torchvision.models`."""
    if "torchvision" not in sys.modules and not _declared and not _compiled_library_loads():
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)
    return importlib.import_module(module)


def _compiled_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for path in sorted(Path(spec.origin).parent.glob("_C*.*")):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return True
    return False
