"""Frozen encoders: pictures → token features, chosen by name.

An encoder's own libraries (timm, onnxruntime) load when it is chosen, so that `dct` and the command line's
help stay quick. All work on B pictures of S×S pixels: uint8 [B, S, S, 3] RGB → float32 [B, H, W, C].
"""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from hierarchy_builder.encoders.dct import DctEncoder
from hierarchy_builder.errors import BuilderError, UsageError

Precision = Literal["auto", "float32", "bfloat16"]


@runtime_checkable
class Encoder(Protocol):
    """What a build needs of an encoder; `module:function` names a function that returns one."""

    name: str
    image_size_px: int
    grid: tuple[int, int]
    width: int
    weights_hash: str

    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3] → float32 [B, H, W, C]; a row never depends on its neighbours."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest: the attributes, `normalisation` and `decoder` (None where there is none)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRow:
    """One line of `hierarchy-builder encoders`; width and grid are None where the file decides."""

    name: str
    description: str
    width: int | None
    grid: tuple[int, int] | None
    needs: str


DINOV2_WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}


def list_encoders() -> list[EncoderRow]:
    """Every name `load_encoder` understands, patterns last."""
    rows = [
        EncoderRow(
            name=f"dinov2{registers}-{size}",
            description=f"DINOv2 ViT-{size[0].upper()}/14"
            + (", 4 registers" if registers else "")
            + ", 224 px",
            width=width,
            grid=(16, 16),
            needs="weights from the hub or --weights FILE",
        )
        for registers in ("-reg", "")
        for size, width in DINOV2_WIDTHS.items()
    ]
    dct = DctEncoder
    patterns = (
        ("timm:NAME", "any timm ViT at its own image size", "weights from the hub or --weights FILE"),
        ("onnx:FILE[:OUTPUT]", "an exported encoder", "onnxruntime"),
        ("module:function", "your own: a function that returns an encoder", "an importable module"),
    )
    return [
        *rows,
        EncoderRow(
            name=dct.name,
            description="DCT of Oklab patches, 256 px, decodes to pixels",
            width=dct().width,
            grid=(16, 16),
            needs="nothing",
        ),
        *(EncoderRow(name=n, description=d, width=None, grid=None, needs=needs) for n, d, needs in patterns),
    ]


def load_encoder(
    name: str,
    *,
    weights: str | None = None,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
) -> Encoder:
    """Load an encoder by the name a build was configured with.

    weights: local file, or `random:SEED` for untrained weights; only for encoders that take any.
    precision: of the arithmetic; `auto` is bfloat16 on CUDA and float32 on a CPU.
    device: where it runs; without it CUDA where there is one.
    Raises UsageError for a name that is not understood, BuilderError when files or packages are missing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    if name.startswith(("dinov2-", "timm:")):
        return _load_timm(name, weights, precision, device)
    if weights is not None and (name == DctEncoder.name or name.startswith("onnx:")):
        raise UsageError(f"encoder {name} takes no weight file, found {weights!r}: leave --weights out")
    if name == DctEncoder.name:
        return DctEncoder(device)
    if name.startswith("onnx:"):
        onnx = importlib.import_module("hierarchy_builder.encoders.onnx")
        return _with_regions(onnx.load_onnx(name, device), name)
    if ":" in name:
        return _with_regions(_load_own(name, weights), name)
    raise _unknown(name)


def _with_regions(encoder: Encoder, origin: str) -> Encoder:
    if encoder.grid[0] * encoder.grid[1] < 2:
        raise UsageError(
            f"encoder {origin!r} gives one token per picture, expected a grid of them: name an output of maps"
        )
    return encoder


def _load_timm(name: str, weights: str | None, precision: str, device: torch.device) -> Encoder:
    if not name.startswith("timm:") and name not in {row.name for row in list_encoders()}:
        raise _unknown(name)
    timm_vit = importlib.import_module("hierarchy_builder.encoders.timm_vit")
    return timm_vit.load_timm(name, weights=weights, precision=precision, device=device)


def _unknown(name: str) -> UsageError:
    known = [row.name for row in list_encoders()]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    nearest = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
    return UsageError(f"unknown encoder {name!r}: {nearest}")


def _load_own(name: str, weights: str | None) -> Encoder:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError:
        raise UsageError(f"encoder {name!r}: module {module_name} has no {function_name!r}") from None
    except Exception as error:  # whatever the module does when it is imported
        raise UsageError(
            f"encoder {name!r}: {error}; expected module:function with the module on PYTHONPATH"
        ) from error
    try:
        encoder = function() if weights is None else function(weights=weights)
    except Exception as error:
        raise BuilderError(f"encoder {name!r}: calling it failed: {type(error).__name__}: {error}") from error
    check_encoder(encoder, name)
    return encoder


def check_encoder(encoder: object, origin: str) -> None:
    """Check attributes and, on one grey picture, shape and dtype of an encoder somebody else wrote.

    Raises BuilderError naming `origin` and everything that is missing or wrong.
    """
    members = ("name", "image_size_px", "grid", "width", "weights_hash", "encode", "describe")
    missing = [member for member in members if not hasattr(encoder, member)]
    if missing or not isinstance(encoder, Encoder):
        raise BuilderError(
            f"encoder {origin!r} returned {type(encoder).__name__} without {', '.join(missing)}; "
            f"expected {', '.join(members)}"
        )
    grid, shape = encoder.grid, (encoder.image_size_px, encoder.width)
    is_grid = isinstance(grid, tuple | list) and len(grid) == 2
    if not is_grid or not all(isinstance(n, int | np.integer) and n >= 1 for n in (*grid, *shape)):
        raise BuilderError(
            f"encoder {origin!r} has image_size_px, width and grid {(*shape, grid)!r}, "
            "expected positive integers and a tuple (rows, columns)"
        )
    encode(encoder, np.full((1, shape[0], shape[0], 3), 128, np.uint8))
    _check_description(encoder, origin)


def _check_description(encoder: Encoder, origin: str) -> None:
    keys = {"name", "image_size_px", "grid", "width", "normalisation", "weights_hash", "decoder"}
    found = encoder.describe()
    try:
        missing = keys - json.loads(json.dumps(found)).keys()
    except (TypeError, ValueError, AttributeError) as error:
        raise BuilderError(
            f"encoder {origin!r}: describe() must give a mapping of plain JSON: {error}"
        ) from None
    if missing:
        raise BuilderError(f"encoder {origin!r}: describe() has no {', '.join(sorted(missing))}")


def encode(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """`encoder.encode`, checked: RGB uint8 [B, S, S, 3] → float32 [B, H, W, C].

    cuDNN would run float32 convolutions in TF32, with 10 bits of mantissa; here float32 means float32.
    Raises BuilderError when it fails or gives another shape or dtype.
    """
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features = encoder.encode(images)
    except BuilderError:
        raise
    except Exception as error:  # theirs, or of the device
        raise BuilderError(
            f"encoder {encoder.name!r} failed on a batch of {len(images)} pictures: "
            f"{type(error).__name__}: {error}; where memory ran out, lower --batch-size"
        ) from error
    expected = (len(images), *encoder.grid, encoder.width)
    found = (getattr(features, "shape", None), str(getattr(features, "dtype", type(features).__name__)))
    if found != (expected, "float32"):
        raise BuilderError(
            f"encoder {encoder.name!r} turned {len(images)} pictures of {images.shape[1]} px into "
            f"{found[0]} {found[1]}, expected {expected} float32 from its grid and width"
        )
    return features
