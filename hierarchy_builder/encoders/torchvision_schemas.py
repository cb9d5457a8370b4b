"""Let torchvision import where its compiled library cannot load.

timm imports torchvision without asking. torchvision registers fake kernels for `nms` and `qnms` while it is
imported; when its compiled library was built for CUDA and the torch beside it was not, the library fails to
load, nobody has declared these operators, and the import ends in
`RuntimeError: operator torchvision::nms does not exist`. Declaring the two schemas is enough: no operator of
torchvision is called here. Where the library loads, it declares them itself and nothing is done.
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
"""Keeps the declarations alive: they end with the object."""


def import_timm() -> ModuleType:
    """Import timm, with torchvision's operators declared if need be."""
    if "torchvision" not in sys.modules and not _declared and not _compiled_library_loads():
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)
    return importlib.import_module("timm")


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
