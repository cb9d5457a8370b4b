"""Label maps drawn by people: they are found by the name of the photo and cropped exactly as the photo.

A map is a PNG with one plane of integers and the size of the upright photo. It is called `<stem>.png`, or
`<stem>_<k>.png` for annotator k, and lies in one folder or in folders like those of the images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from hierarchy_builder.errors import ImageError, UsageError
from hierarchy_builder.fields import config_hash
from hierarchy_builder.files.untrusted.pictures import UNREADABLE, open_picture
from hierarchy_builder.files.whole import sha256_file
from hierarchy_builder.images.decoding import crop_square
from hierarchy_builder.images.keys import composed

LABEL_MODES = ("1", "L", "P", "I", "I;16")
VOTES_PER_SIDE = 8
"""Sampled cells along each side of a token; the most frequent label among them becomes the label of the token."""
NUMBERED = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True, slots=True)
class MaskFolder:
    """Label maps in `root`; `files` maps the end of the path of a photo, without extension, to its maps."""

    root: Path
    files: dict[str, list[Path]]

    def digest(self) -> str:
        """SHA-256 over names and bytes of all maps, as 64 hex digits."""
        listed = sorted({file for files in self.files.values() for file in files})
        return config_hash({file.relative_to(self.root).as_posix(): sha256_file(file) for file in listed})

    def of(self, path: str) -> list[Path]:
        """Maps of the photo listed at `path`, in the order of their numbers; empty if there are none."""
        parts = PurePosixPath(composed(path)).with_suffix("").parts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((self.files[end] for end in ends if end in self.files), [])

    def tokens(
        self, path: str, width: int | None, height: int | None, *, image_size_px: int, grid: tuple[int, int]
    ) -> np.ndarray:
        """Return the first usable map of a photo at one label per token, int64 [H, W]; see `majority`.

        All labels are −1 if the photo has no usable map. width, height: size of the upright photo in pixels.
        """
        if width is not None and height is not None:
            cells = (grid[0] * VOTES_PER_SIDE, grid[1] * VOTES_PER_SIDE)
            maps, _ = self.read(path, (width, height), image_size_px, cells)
            if len(maps):
                return majority(maps[0], grid)
        return np.full(grid, -1, dtype=np.int64)

    def check_photos(self, paths: Sequence[str]) -> None:
        """Raise UsageError if no photo has a map, or if one map matches two photos."""
        owners: dict[Path, str] = {}
        for path in paths:
            for file in self.of(path):
                if owners.setdefault(file, path) != path:
                    raise UsageError(
                        f"--masks {self.root}: {file.name} matches both {owners[file]} and {path}: put the "
                        "maps into folders like those of the images"
                    )
        if not owners:
            stem = PurePosixPath(paths[0]).stem
            raise UsageError(
                f"--masks {self.root} has no map for any of {len(paths)} images: expected {stem}.png or {stem}_0.png "
                f"for {paths[0]}"
            )

    def read(
        self, path: str, photo_size: tuple[int, int], image_size_px: int, cells: tuple[int, int]
    ) -> tuple[np.ndarray, list[ImageError]]:
        """Read the maps of one photo; return the usable ones, int64 [M, h, w], and the errors of the others."""
        maps, refused = [], []
        for file in self.of(path):
            try:
                maps.append(read_mask(file, photo_size, image_size_px, cells))
            except ImageError as error:
                refused.append(error)
        return np.stack(maps) if maps else np.empty((0, *cells), dtype=np.int64), refused


def open_masks(root: Path) -> MaskFolder:
    """List a folder of label maps. Raises UsageError if it contains none."""
    files: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(root.rglob("*.png")):
        stem = composed(path.relative_to(root).with_suffix("").as_posix())
        files.setdefault(stem, []).append((-1, path))
        if numbered := NUMBERED.fullmatch(stem):
            files.setdefault(numbered[1], []).append((int(numbered[2]), path))
    if not files:
        raise UsageError(
            f"--masks {root} contains no label maps: expected <stem>.png or <stem>_<k>.png, named after the photos"
        )
    return MaskFolder(root, {stem: [path for _, path in sorted(found)] for stem, found in files.items()})


def majority(cells: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The most frequent label among the cells of each token, int64 [H, W]; of equally frequent ones the smallest."""
    height, width = grid
    side = (cells.shape[0] // height, cells.shape[1] // width)
    tokens = cells.reshape(height, side[0], width, side[1]).swapaxes(1, 2).reshape(height * width, -1)
    votes = (tokens[:, :, None] == tokens[:, None, :]).sum(axis=2)
    wins = votes == votes.max(axis=1, keepdims=True)
    return np.where(wins, tokens, tokens.max(initial=0) + 1).min(axis=1).reshape(height, width)


def read_mask(
    path: Path, photo_size: tuple[int, int], image_size_px: int, cells: tuple[int, int]
) -> np.ndarray:
    """Read a label map, crop it as its photo and sample it at `cells` = (h, w): int64 [h, w].

    Label 0 stays 0, and the other labels are renumbered from 1. A cell takes the label of the pixel at its centre.
    photo_size: (width, height) of the upright photo.
    Raises ImageError with reason `not_a_label_map` or `wrong_size`.
    """
    square = crop_square(_open_labels(path, photo_size), image_size_px, Image.Resampling.NEAREST)
    centres = [((np.arange(number) + 0.5) * image_size_px / number).astype(np.int64) for number in cells]
    labels = square[np.ix_(*centres)]
    values, ids = np.unique(labels, return_inverse=True)
    return ids.reshape(labels.shape) + int(values[0] != 0)


def _open_labels(path: Path, photo_size: tuple[int, int]) -> Image.Image:
    try:
        with open_picture(path) as image:
            if image.size != photo_size:
                found, expected = ("×".join(map(str, size)) for size in (image.size, photo_size))
                raise ImageError(
                    "wrong_size", f"{path.name} has {found} pixels, expected {expected} as its photo"
                )
            image.load()
    except UNREADABLE as error:
        raise ImageError("not_a_label_map", f"{path.name}: {error}") from None
    if image.mode not in LABEL_MODES:
        raise ImageError(
            "not_a_label_map", f"{path.name} has mode {image.mode}, expected one plane of integer labels"
        )
    return image
