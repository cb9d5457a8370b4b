"""Encodes the images of one unit: threads read, decode and crop them while another thread runs the encoder.

b images of a batch, S×S pixels, H×W grid, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from hierarchy_builder.encoders import Encoder, encode
from hierarchy_builder.errors import BuilderError, ImageError
from hierarchy_builder.files.remote import StoreError
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.originals import file_hash, modified_ns
from hierarchy_builder.images.sources import Reader
from hierarchy_builder.machine.process import ahead
from hierarchy_builder.records import FEATURE_DTYPE, ImageRecord

FLOAT16_EXPONENT = np.uint16(0x7C00)
"""Exponent bits of a float16; all of them are set in NaN and infinity."""

_Loaded = tuple[np.ndarray, bytes | None]
"""A crop uint8 [S,S,3] and the result of `ImageEncoder.keep` for it."""
Outcome = dict[str, Any]
"""Columns of index.parquet for one image from `status` on, and `modified`; empty until the image has been processed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Rows of a unit with their features float16 [b,H,W,C].

    finite: bool [b]; features that are not finite in float16 are stored as zeros. pictures: results of `keep`.
    """

    rows: list[int]
    features: np.ndarray
    finite: np.ndarray
    pictures: list[bytes | None]


@dataclass(slots=True)
class ImageEncoder:
    """An encoder with a reader for its input; a worker keeps one for all its units.

    batch_size: images per evaluation; it is halved for good when the device runs out of memory.
    keep: called with the upright photo and its crop uint8 [S,S,3]; its result is stored next to the features.
    """

    encoder: Encoder
    reader: Reader
    batch_size: int
    max_pixels: int
    keep: Callable[[Image.Image, np.ndarray], bytes | None] = lambda image, crop: None

    def batches(
        self, records: list[ImageRecord], outcomes: list[Outcome], pool: Executor
    ) -> Iterator[EncodedBatch]:
        """Encode the images without an outcome, in order, and fill in their outcomes.

        `pool` decodes a bounded number of images ahead while another thread encodes the previous batch.
        Raises BuilderError if the encoder fails; an unusable image is only skipped, with the reason in its outcome.
        """
        todo = [row for row, outcome in enumerate(outcomes) if not outcome]
        loaded = ahead(pool, self._load, (records[row] for row in todo), 2 * self.batch_size)
        # with two batches at once a GPU has the next when it ends one
        at_once = 2 if torch.device(getattr(self.encoder, "device", "cpu")).type == "cuda" else 1
        with ThreadPoolExecutor(at_once) as device:
            yield from ahead(device, self._encode, self._gather(todo, loaded, outcomes), at_once)

    def _gather(
        self, todo: list[int], loaded: Iterator[tuple[_Loaded | None, Outcome]], outcomes: list[Outcome]
    ) -> Iterator[tuple[list[int], list[_Loaded]]]:
        rows: list[int] = []
        found: list[_Loaded] = []
        for row, (one, outcome) in zip(todo, loaded, strict=True):
            outcomes[row] = outcome
            if one is not None:
                rows.append(row)
                found.append(one)
            if len(rows) >= self.batch_size:
                yield rows, found
                rows, found = [], []
        if rows:
            yield rows, found

    def _encode(self, batch: tuple[list[int], list[_Loaded]]) -> EncodedBatch:
        rows, (crops, pictures) = batch[0], zip(*batch[1], strict=True)
        parts = list(self._evaluate(np.stack(crops)))
        stored, finite = (np.concatenate(found) for found in zip(*map(stored_rows, parts), strict=True))
        if not finite.all():
            stored[~finite] = 0
        return EncodedBatch(rows=rows, features=stored, finite=finite, pictures=list(pictures))

    def _evaluate(self, crops: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the features of a batch, in several consecutive parts if memory runs out."""
        start = 0
        while start < len(crops):
            part = crops[start : start + self.batch_size]
            try:
                values = encode(self.encoder, part, half=True)
            except BuilderError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError) or len(part) == 1:
                    raise
                self.batch_size = len(part) // 2
            else:
                yield values
                start += len(part)
                continue
            torch.cuda.empty_cache()  # only here has the traceback released the tensors of the failed evaluation

    def _load(self, record: ImageRecord) -> tuple[_Loaded | None, Outcome]:
        try:
            modified = modified_ns(self.reader, record.path)
            data = self.reader.read(record.path)
            known = {"file_hash": file_hash(data), **({"modified": modified} if modified is not None else {})}
            with ExitStack() as turn:
                image, facts = decode_image(data, self.max_pixels, turn)
                crop = crop_square(image, self.encoder.image_size_px)
                return (crop, self.keep(image, crop)), asdict(facts) | known
        except ImageError as error:
            return None, {"reason": str(error)}
        except StoreError:
            raise
        except OSError as error:
            return None, {"reason": f"unreadable: {error.strerror or error}"}
        except MemoryError:
            return None, {"reason": "too_large: preparing it needs more memory than there is"}


def stored_rows(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `encode` returned for a batch, as float16 [b,H,W,C], and which rows are finite: bool [b]."""
    if features.dtype == FEATURE_DTYPE:  # the encoder has checked it, see `encode`
        return features, ~np.isnan(features[:, 0, 0, 0])
    with np.errstate(over="ignore"):
        stored = features.astype(FEATURE_DTYPE)
    return stored, finite_rows(stored)


def finite_rows(features: np.ndarray) -> np.ndarray:
    """Which rows of float16 [b, ...] are finite: bool [b]. This is 7 times as fast as np.isfinite."""
    bits = features.view(np.uint16) & FLOAT16_EXPONENT
    return bits.reshape(len(features), -1).max(axis=1) != FLOAT16_EXPONENT
