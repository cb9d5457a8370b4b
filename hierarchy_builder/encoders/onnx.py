"""Exported encoders: `onnx:FILE` or `onnx:FILE:OUTPUT`, run by onnxruntime.

The model takes RGB float32 [N, 3, S, S] and returns maps [N, C, H, W] or tokens [N, prefix + H·W, C]. A metadata key
of the model can set each of the following; without the key the rule next to it applies:

    image_size_px   the static size of the input, else 256
    mean, std       three numbers each, for pixels in [0, 1]; else 0.5, so that pixels lie in [−1, 1]
    output          the only map with at least 64 channels (maps of class scores are narrower), else the only map, else
                    the only token sequence. Where several fit, the user says which.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.fields import nearest
from hierarchy_builder.files.whole import sha256_file
from hierarchy_builder.machine.installing import install_extras

DEFAULT_SIZE_PX = 256
MIN_FEATURE_CHANNELS = 64
LAST = "last"
"""In place of the name of an output: the last that fits, which builds took that were begun without a name."""


class OnnxEncoder:
    """An onnxruntime session as an encoder. Raises UsageError if the model is no image encoder."""

    def __init__(self, path: Path, output: str | None, device: torch.device) -> None:
        self.name = f"onnx:{path.name}" + (f":{output}" if output and output != LAST else "")
        self.path = path
        self.weights_hash = sha256_file(path)
        self.session = _open_session(path, device)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.input, self.batch, self.image_size_px = self._read_input()
        self.mean = self._three_numbers("mean")
        self.std = self._three_numbers("std")
        self.outputs = {each.name: each.shape for each in self.session.get_outputs()}
        self.output = self._choose_output(output or self.metadata.get("output"))
        if output == self.output == LAST:
            self.name += f":{LAST}"
        grey = np.full((1, self.image_size_px, self.image_size_px, 3), 128, np.uint8)
        _, *grid, self.width = self.encode(grey).shape
        self.grid: tuple[int, int] = (grid[0], grid[1])

    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3] → float32 [B, H, W, C]."""
        pixels = (images.astype(np.float32) / 255 - self.mean) / self.std
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        step = self.batch or len(pixels)
        parts = [self._run(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        return _channels_last(np.concatenate(parts), self.name)

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest; an exported encoder has no decoder."""
        return {
            "name": self.name,
            "image_size_px": self.image_size_px,
            "grid": list(self.grid),
            "width": self.width,
            "output": self.output,
            "normalisation": {"mean": self.mean.tolist(), "std": self.std.tolist()},
            "weights_hash": self.weights_hash,
            "decoder": None,
        }

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        count = len(pixels)
        if self.batch and count < self.batch:
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], self.batch - count, axis=0)])
        return self.session.run([self.output], {self.input: pixels})[0][:count]

    def _read_input(self) -> tuple[str, int | None, int]:
        (first, *others) = self.session.get_inputs()
        shape = first.shape
        if others or len(shape) != 4 or shape[1] != 3 or first.type != "tensor(float)":
            raise UsageError(
                f"{self.name}: found input {first.name} {shape} {first.type} and {len(others)} more, "
                "expected one float input [N, 3, H, W]"
            )
        if isinstance(shape[2], int) and shape[2] != shape[3]:
            raise UsageError(
                f"{self.name}: found an input of {shape[2]}×{shape[3]} pixels, expected a square"
            )
        static = shape[2] if isinstance(shape[2], int) else DEFAULT_SIZE_PX
        size_px = int(self.metadata.get("image_size_px", static))
        return first.name, shape[0] if isinstance(shape[0], int) else None, size_px

    def _three_numbers(self, key: str) -> np.ndarray:
        text = self.metadata.get(key, "0.5,0.5,0.5")
        try:
            values = np.array([float(part) for part in text.strip("[]() ").split(",")], np.float32)
        except ValueError:
            values = np.empty(0, np.float32)
        if values.shape != (3,):
            raise UsageError(
                f"{self.name}: metadata {key} is {text!r}, expected three numbers such as 0.5,0.5,0.5"
            )
        return values

    def _choose_output(self, wanted: str | None) -> str:
        outputs, fitting = self.outputs, self._fitting()
        if wanted is not None and wanted in outputs:
            return wanted
        if wanted is not None and wanted != LAST:
            raise UsageError(f"{self.name}: unknown output {wanted!r}, {nearest(wanted, outputs)}")
        if not fitting:
            raise UsageError(
                f"{self.name}: outputs are {outputs}, expected one [N, C, H, W] or [N, tokens, C]"
            )
        if len(fitting) > 1 and wanted is None:
            shown = ", ".join(f"{name} {outputs[name]}" for name in fitting)
            raise UsageError(
                f"{self.name} has {len(fitting)} outputs that fit, and its metadata names none: {shown}. Say which by "
                f"--encoder onnx:{self.path}:{fitting[-1]} (the last is often the deepest); a build that was begun "
                f"without a name goes on with onnx:{self.path}:{LAST}"
            )
        return fitting[-1]

    def _fitting(self) -> list[str]:
        """The outputs that can be features, in their order."""
        maps = {name: shape[1] for name, shape in self.outputs.items() if len(shape) == 4}
        wide = [
            name
            for name, channels in maps.items()
            if isinstance(channels, int) and channels >= MIN_FEATURE_CHANNELS
        ]
        return wide or [*maps] or [name for name, shape in self.outputs.items() if len(shape) == 3]

    def choices(self) -> str:
        """One sentence: which output is taken, how pixels are normalised, and what says so."""
        source = "the name" if self.name.endswith(f":{self.output}") else "the model's metadata"
        if "output" not in self.metadata and source != "the name":
            source = "it is the one that fits" if len(self._fitting()) == 1 else "as asked"
        numbers = "the model's metadata" if {"mean", "std"} & self.metadata.keys() else "the default"
        mean, std = (",".join(f"{each:g}" for each in values) for values in (self.mean, self.std))
        size, (rows, columns) = self.image_size_px, self.grid
        return (
            f"{self.name} takes output {self.output} ({source}), {rows}×{columns} tokens of {self.width} channels, "
            f"from {size}×{size} pixels in [0, 1] normalised by mean {mean} and std {std} ({numbers})"
        )


def load_onnx(name: str, device: torch.device) -> OnnxEncoder:
    """Open `onnx:FILE` or `onnx:FILE:OUTPUT`; if a file of the whole name exists, its colons are part of the name."""
    text = name.removeprefix("onnx:")
    path, _, output = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"encoder {name}: file {path or text!r} not found, expected onnx:FILE[:OUTPUT]")
    return OnnxEncoder(Path(path), output or None, device)


def _open_session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise BuilderError(f"onnx encoders need onnxruntime: {install_extras('onnx')}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    cuda = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        reason = " ".join(str(error).split())[:300]
        raise BuilderError(f"{path} is not a model that onnxruntime can run: {reason}") from None


def _channels_last(values: np.ndarray, name: str) -> np.ndarray:
    """Bring [B, C, H, W], or tokens [B, T, C] with T = prefix + G², into the layout float32 [B, H, W, C]."""
    if values.ndim == 3:
        side = math.isqrt(values.shape[1])
        values = values[:, values.shape[1] - side * side :].reshape(len(values), side, side, -1)
    elif values.ndim == 4:
        values = values.transpose(0, 2, 3, 1)
    else:
        raise UsageError(f"{name}: output has shape {values.shape}, expected [N, C, H, W] or [N, tokens, C]")
    return np.ascontiguousarray(values, dtype=np.float32)
