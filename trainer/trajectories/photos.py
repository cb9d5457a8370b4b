"""Trajectories that start from a photograph: the levels are its hierarchy, to be edited and resumed.

    S×S pixels, H×W grid of tokens, C channels

The photograph is a sample of shards, which holds features and regions, or a picture file, which the encoder that the
model was trained on has to encode. The trainer has no encoder of its own: the caller passes an object, or names a
`module:function` that returns one.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError, UserError
from hierarchy_builder.files.untrusted.pictures import UNREADABLE, open_picture
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.trajectories.pipeline import TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory

BY_NAME = "hierarchy_builder.encoders:load_encoder"
"""Loads encoders that the builder knows by a name, without an import of the builder here."""


class Encoder(Protocol):
    """The attributes that an encoder needs; encoders of hierarchy_builder have them."""

    name: str
    image_size_px: int

    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3] → float32 [B, H, W, C]."""
        ...


def start_from_shards(
    pipe: TrajectoryPipeline, index: ShardIndex, sample: str | int, *, seed: int = 0
) -> Trajectory:
    """Start a trajectory from a sample of shards, given by key or number; the class is that of the sample.

    Raises UsageError for an unknown sample, MismatchError if the shards are not of the model's encoder and recipe.
    """
    _require_encoder(pipe, index.encoder, f"{index.url} holds features of")
    with contextlib.closing(ShardReader(index)) as reader:
        number = sample if isinstance(sample, int) else reader.number_of(sample)
        if not 0 <= number < len(reader):
            raise UsageError(f"sample {number}, expected 0 to {len(reader) - 1}")
        found = reader.read(number)
    origin = {"source": "shards", "shards": index.name, "key": found.key}
    return pipe.from_features(found.features, found.regions, label=found.label, seed=seed, origin=origin)


def start_from_photo(
    pipe: TrajectoryPipeline, photo: str | Path, encoder: Encoder, *, label: int | str, seed: int = 0
) -> Trajectory:
    """Start a trajectory from a picture file, turned upright and cut to its centre square.

    Regions are found by the recipe of the paper. label: class of levels that are drawn later.
    Raises TrainerError for a file that is no picture, MismatchError if the encoder or its weights are not the model's.
    """
    given = {"name": encoder.name, "weights_hash": getattr(encoder, "weights_hash", None)}
    _require_encoder(pipe, given, "the photograph would be encoded by")
    picture = read_square(photo, encoder.image_size_px)
    origin = {"source": "photo", "name": Path(photo).name, "encoder": encoder.name}
    return pipe.from_features(encoded_by(encoder, picture[None])[0], label=label, seed=seed, origin=origin)


def encoded_by(encoder: Encoder, pictures: np.ndarray) -> np.ndarray:
    """Features of pictures, uint8 [B, S, S, 3] → float32 [B, H, W, C].

    Raises TrainerError, since encoders may be anybody's code, where one fails or returns anything else.
    """
    try:
        features = np.asarray(encoder.encode(pictures), np.float32)
    except UserError:
        raise
    except Exception as error:
        raise TrainerError(
            f"encoder {encoder.name!r} failed on a batch of {len(pictures)} images: {type(error).__name__}: {error}"
        ) from error
    if features.ndim != 4 or len(features) != len(pictures):
        raise TrainerError(
            f"encoder {encoder.name!r} returned features of shape {features.shape} for {len(pictures)} images, "
            "expected [images, rows, columns, channels]"
        )
    return features


def _require_encoder(pipe: TrajectoryPipeline, given: Mapping[str, Any], what: str) -> None:
    """Raise MismatchError unless the encoder is the model's, by name and hash of its weights where both are known."""
    for name, shown in (("name", "encoder"), ("weights_hash", "weights")):
        ours, theirs = pipe.encoder.get(name), given.get(name)
        if ours and theirs and ours != theirs:
            advice = (
                "pass --weights with the file of the build" if name == "weights_hash" else "use that encoder"
            )
            raise MismatchError(
                f"{what} {shown} {theirs!r}, and the model was trained on features of {shown} {ours!r}: {advice}"
            )


def read_square(photo: str | Path, side_px: int) -> np.ndarray:
    """Read the upright centre square of a picture file, resampled bicubically: RGB uint8 [S, S, 3].

    Raises TrainerError if the file is not a picture.
    """
    try:
        with open_picture(photo) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
            square = ImageOps.fit(upright, (side_px, side_px), Image.Resampling.BICUBIC)
    except UNREADABLE as error:
        raise TrainerError(f"{photo} is not a picture that can be read: {error}") from None
    return np.array(square)


def encoder_name(pipe: TrajectoryPipeline) -> str:
    """The name of the encoder whose features the model was trained on.

    Raises UsageError where it is code or a file, which a run can name but may not choose.
    """
    name = str(pipe.encoder.get("name", ""))
    if not name or (":" in name and not name.startswith("timm:")):
        raise UsageError(
            f"the model was trained on features of {name or 'an unknown encoder'!r}: name it by --encoder"
        )
    return name


def load_own_encoder(name: str, weights: str | None = None) -> Encoder:
    """Load an encoder of the builder by its name there, or call `module:function` or `module:function:ARGUMENT`.

    weights: passed on as `weights=…`. Raises UsageError for what cannot be loaded or has no `encode`.
    """
    is_own = ":" in name and not name.startswith(("timm:", "onnx:"))
    module, _, rest = (name if is_own else f"{BY_NAME}:{name}").partition(":")
    function, *argument = rest.split(":", 1)
    if not function:
        raise UsageError(f"encoder {name!r}, expected module:function, a function that returns an encoder")
    options = {} if weights is None else {"weights": weights}
    try:
        encoder: Any = getattr(importlib.import_module(module), function)(*argument, **options)
    except Exception as error:  # whatever an encoder of somebody does when it is loaded
        raise UsageError(f"encoder {name!r}: {error}") from None
    if missing := [each for each in ("name", "image_size_px", "encode") if not hasattr(encoder, each)]:
        raise UsageError(f"encoder {name!r} returns {type(encoder).__name__}, which has no {missing[0]}")
    return encoder
