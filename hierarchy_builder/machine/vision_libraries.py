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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hierarchy_builder.files.untrusted.pickles import check_pickle, check_sizes

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


def timm_model(
    name: str, file: Path, change: Callable[[dict[str, Any]], object] | None = None, **arguments: Any
) -> Any:
    """A model of timm without its classifier, with the weights of a file, which must hold all of them.

    If timm omits the classifier, it no longer checks for missing weights and leaves them random. Therefore the
    classifier is removed from the file's tensors here, and timm is configured for a model without one.
    change: called with the tensors by name. Raises whatever the format of the file, or timm, raises.
    """
    timm = import_vision("timm")
    config = timm.models.get_pretrained_cfg(name)
    classifier = (config and config.classifier) or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    if file.suffix != ".safetensors":
        check_pickle(file)
    state = timm.models.load_state_dict(str(file))  # weights_only, or safetensors
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):  # timm would write out lists of lists, which have no end
            raise ValueError(f"{key!r} is a {type(value).__name__}, no tensor")
    check_sizes(file, state)
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    if change is not None:
        change(state)
    overlay = {"state_dict": state, "classifier": None, "custom_load": False}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **arguments
    )
    model.pretrained_cfg.pop("state_dict", None)
    return model


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
