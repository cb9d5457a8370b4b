"""Batches of features together with the pictures they came from, for shards built with `--images`.

b images of one rank, H×W grid of tokens, C channels, L levels, h×w pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hierarchy_builder.errors import MismatchError, TrainerError
from hierarchy_builder.fields import brief
from hierarchy_builder.files.untrusted.pictures import UNREADABLE, open_picture
from hierarchy_builder.records import Sample
from trainer.data.reader import Rows
from trainer.data.shards import ShardIndex
from trainer.data.stream import RankShare, StreamPlan


@dataclass(kw_only=True, slots=True)
class PictureBatch(Rows):
    """One rank's share of a global batch, with pictures."""

    __repr__ = brief

    pictures: Tensor
    """uint8 [b, 3, h, w], RGB"""


class PictureDataset(RankShare):
    """Item n is rank `rank`'s share of global batch n of `plan`, with pictures; see `RankShare`.

    size_px: (h, w) to which pictures are resized. Raises TrainerError if the shards hold no pictures or a picture
    cannot be decoded.
    """

    def __init__(
        self, index: ShardIndex, plan: StreamPlan, size_px: tuple[int, int], *share: Any, **checks: Any
    ) -> None:
        super().__init__(index, plan, *share, **checks)
        self._size = size_px

    def read(self, number: int, pin_memory: bool = False) -> PictureBatch:
        """Read item `number`, into page-locked memory if `pin_memory`."""
        numbers, _ = self.places(number)
        batch = self.samples(numbers.tolist())
        return batch.pinned() if pin_memory else batch

    def samples(self, numbers: Sequence[int]) -> PictureBatch:
        """Read samples by number, counted through all shards."""
        samples = [self._reader.read(number, extras=True) for number in numbers]
        pictures = np.stack(
            [
                picture_of(sample, self._size, self._reader.shard_of(number))
                for sample, number in zip(samples, numbers, strict=True)
            ]
        )
        return PictureBatch(
            features=torch.from_numpy(np.stack([sample.features for sample in samples])),
            pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
            regions=torch.from_numpy(np.stack([sample.regions for sample in samples])),
            label=torch.tensor([sample.label for sample in samples]),
            keys=[sample.key for sample in samples],
        )

    @property
    def num_bytes(self) -> int:
        """Approximate size of an item."""
        tokens = self._index.grid[0] * self._index.grid[1]
        return self._share * (2 * tokens * self._index.width + 3 * self._size[0] * self._size[1])


def picture_of(sample: Sample, size_px: tuple[int, int], shard: str = "") -> np.ndarray:
    """The picture that a sample was made from, resized to (h, w): RGB uint8 [h, w, 3].

    shard: where the sample is from, for messages. Raises TrainerError if there is no picture or it cannot be decoded,
    MismatchError if it has another aspect ratio.
    """
    named = f"{shard}, sample {sample.key}" if shard else f"sample {sample.key}"
    if sample.image is None:
        raise TrainerError(
            f"{named} holds no picture: rebuild the shards with "
            "`hierarchy-builder shard DIR --images --fresh`"
        )
    try:
        with open_picture(sample.image) as picture:
            rgb = picture.convert("RGB")
    except UNREADABLE as error:
        raise TrainerError(f"{named}: its picture cannot be decoded: {error}") from None
    height, width = size_px
    if rgb.width * height != rgb.height * width:
        raise MismatchError(
            f"{named}: its picture has {rgb.width}×{rgb.height} pixels, but the grid of tokens "
            f"has the aspect ratio of {width}×{height}; build the shards again"
        )
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(rgb)
