"""Frozen encoders that turn images into token features; they are chosen by name.

The library of an encoder (timm, onnxruntime) is imported when that encoder is loaded, so that `dct` and `--help` start
quickly. All encoders map B images of S×S pixels, uint8 [B, S, S, 3] RGB, to float32 [B, H, W, C].
"""

from __future__ import annotations

import importlib
import json
import threading
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from hierarchy_builder.encoders.dct import DctEncoder
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.fields import nearest

Precision = Literal["auto", "float32", "bfloat16"]

_BEGINNING = threading.RLock()
"""Held while work is given to a device, since the flags of cuDNN are those of the process."""


@runtime_checkable
class Encoder(Protocol):
    """Interface of an encoder; `module:function` names a function that returns one."""

    name: str
    image_size_px: int
    grid: tuple[int, int]
    width: int
    weights_hash: str

    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3] → float32 [B, H, W, C]; no row depends on other rows of the batch."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest: the attributes, `normalisation`, and `decoder` (None if the encoder has none)."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderRow:
    """One line of `hierarchy-builder encoders`; width and grid are None if the model file decides them."""

    name: str
    description: str
    width: int | None
    grid: tuple[int, int] | None
    needs: str


DINOV2_WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}


def list_encoders() -> list[EncoderRow]:
    """All names that `load_encoder` accepts, patterns last."""
    weights, grid = "weights from the hub or --weights FILE", (16, 16)
    dct = "DCT of Oklab patches, 256 px, decodes to pixels"
    return [
        *(
            EncoderRow(
                f"dinov2{infix}-{size}",
                f"DINOv2 ViT-{size[0].upper()}/14{note}, 224 px",
                width,
                grid,
                weights,
            )
            for infix, note in (
                ("-reg", ", 4 registers"),
                ("", ""),
                ("-original", ", positions resized as by its authors"),
            )
            for size, width in DINOV2_WIDTHS.items()
        ),
        EncoderRow(DctEncoder.name, dct, DctEncoder().width, grid, "nothing"),
        EncoderRow("timm:NAME", "any timm ViT at its own image size", None, None, weights),
        EncoderRow(
            "NAME@K",
            "dinov2-… or timm:NAME after its first K blocks; the others are not run",
            None,
            None,
            weights,
        ),
        EncoderRow("onnx:FILE[:OUTPUT]", "an exported encoder", None, None, "onnxruntime"),
        EncoderRow(
            "module:function", "your own function that returns an encoder", None, None, "an importable module"
        ),
    ]


def check_stored_encoder(name: str, where: object, *, trusted: bool) -> None:
    """Refuse an encoder that a build names and that is a function, unless `trusted`: loading it runs its code.

    where: the build, for the message. Raises UsageError.
    """
    is_known = name == DctEncoder.name or name.startswith(("dinov2-", "timm:", "onnx:"))
    if ":" in name and not is_known and not trusted:
        raise UsageError(
            f"the encoder of {where} is the function {name!r}, and loading it runs code that the build names: if you "
            "trust whoever made the build, add --trust-encoder"
        )


def load_encoder(
    name: str,
    *,
    weights: str | None = None,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
) -> Encoder:
    """Load an encoder by name; `@K` after the name of a ViT keeps its first K blocks.

    weights: local file, or `random:SEED` for untrained weights; only some encoders accept it.
    precision: precision of the arithmetic; `auto` is bfloat16 on CUDA and float32 on a CPU.
    device: by default CUDA if available, else the CPU.
    Raises UsageError for an unknown name, and BuilderError if a file or package is missing, or the device fails.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return _load(name, weights, precision, device)
    except RuntimeError as error:  # of torch or its device, such as no memory
        raise BuilderError(
            f"encoder {name} could not be loaded for {device}: {str(error).partition(chr(10))[0]}; "
            "`hierarchy-builder doctor` looks at the device, and CUDA_VISIBLE_DEVICES= before the command leaves it out"
        ) from error


def _load(name: str, weights: str | None, precision: Precision, device: torch.device) -> Encoder:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    whole = name.partition("@")[0]
    if name.startswith("dinov2-") and whole not in {row.name for row in list_encoders()}:
        raise _unknown(whole)
    if name.startswith(("dinov2-", "timm:")):
        from hierarchy_builder.encoders.timm_vit import load_timm

        return load_timm(name, weights=weights, precision=precision, device=device)
    if weights is not None and (name == DctEncoder.name or name.startswith("onnx:")):
        raise UsageError(f"encoder {name} takes no weight file, found {weights!r}: omit --weights")
    if name == DctEncoder.name:
        return DctEncoder(device)
    if name.startswith("onnx:"):
        from hierarchy_builder.encoders.onnx import load_onnx

        encoder: Encoder = load_onnx(name, device)
    elif ":" in name:
        encoder = _load_custom(name, weights)
    else:
        raise _unknown(name)
    if encoder.grid[0] * encoder.grid[1] < 2:
        raise UsageError(
            f"encoder {name!r} gives one token per image, expected a grid of tokens: choose an output that is a "
            "feature map"
        )
    return encoder


def _unknown(name: str) -> UsageError:
    return UsageError(f"unknown encoder {name!r}: {nearest(name, [row.name for row in list_encoders()])}")


def _load_custom(name: str, weights: str | None) -> Encoder:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError:
        raise UsageError(
            f"encoder {name!r}: module {module_name} has no function {function_name!r}"
        ) from None
    except Exception as error:  # importing a module can raise anything
        raise UsageError(
            f"encoder {name!r}: {error}; expected module:function, where PYTHONPATH finds the module"
        ) from error
    try:
        encoder = function() if weights is None else function(weights=weights)
    except Exception as error:
        raise BuilderError(f"encoder {name!r}: calling it failed: {type(error).__name__}: {error}") from error
    check_encoder(encoder, name)
    return encoder


def check_encoder(encoder: object, origin: str) -> None:
    """Check attributes and description of a custom encoder, and shape and dtype of its output for one grey image.

    Raises BuilderError with `origin` and everything that is missing or wrong.
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
    keys = {"name", "image_size_px", "grid", "width", "normalisation", "weights_hash", "decoder"}
    try:
        absent = keys - json.loads(json.dumps(encoder.describe())).keys()
    except (TypeError, ValueError, AttributeError) as error:
        raise BuilderError(
            f"encoder {origin!r}: describe() must return a dict that JSON can hold: {error}"
        ) from None
    if absent:
        raise BuilderError(f"encoder {origin!r}: describe() has no {', '.join(sorted(absent))}")


def encode(encoder: Encoder, images: np.ndarray, *, half: bool = False) -> np.ndarray:
    """Call `encoder.encode` and check its result: RGB uint8 [B, S, S, 3] → float32 [B, H, W, C].

    half: take float16 of an encoder that has `begin_half`, which returns before its device has ended, so that threads
    begin one after another and wait together; an image whose features are not finite in float16 is then NaN throughout.
    TF32 is disabled, since cuDNN would otherwise run float32 convolutions with 10 bits of mantissa.
    Raises BuilderError if the encoder fails or returns another shape or dtype.
    """
    try:
        with _BEGINNING, torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features = (getattr(encoder, "begin_half", encoder.encode) if half else encoder.encode)(images)
        if callable(features):
            features = features()
    except BuilderError:
        raise
    except Exception as error:  # from custom code, or from the device
        raise BuilderError(
            f"encoder {encoder.name!r} failed on a batch of {len(images)} images: "
            f"{type(error).__name__}: {error}; if memory ran out, lower --batch-size"
        ) from error
    expected = (len(images), *encoder.grid, encoder.width)
    found = (getattr(features, "shape", None), str(getattr(features, "dtype", type(features).__name__)))
    if found[0] != expected or found[1] not in ("float32", "float16")[: 1 + half]:
        raise BuilderError(
            f"encoder {encoder.name!r} returned {found[0]} {found[1]} for {len(images)} images of "
            f"{images.shape[1]} px, expected {expected} float32 from its grid and width"
        )
    return features
