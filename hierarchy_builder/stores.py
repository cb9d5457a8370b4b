"""The zarr stores between the stages: features.zarr and regions.zarr, written one whole block at a time.

    N images, B rows in a block, H×W grid, C channels, L levels, T = H·W tokens

A block is one zarr shard of every array, so a block has one writer and is replaced whole. Chunks carry a crc32c,
since a flipped byte passes unnoticed otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.records import FEATURE_DTYPE, FORMAT_VERSION, MAX_REGIONS, REGION_DTYPE, Block
from hierarchy_builder.statistics import Moments

ROWS_PER_CHUNK = 8
"""Rows read together at random access; a block is a whole number of chunks or a single short one."""


def create_features(path: Path, *, num_rows: int, block_rows: int, grid: tuple[int, int], width: int) -> None:
    """Create features.zarr: `features` float16 [N,H,W,C], `status` uint8 [N], and the statistics of each block.

    `block_count` int64 [blocks], `block_mean` and `block_m2` float64 [blocks,H,W,C] hold count, mean and sum of
    squared deviations of a block's usable rows. An existing store of the same shape is kept.
    """
    token_shape = (*grid, width)
    num_blocks = -(-num_rows // block_rows)
    arrays = {
        "features": _by_rows(num_rows, block_rows, token_shape, FEATURE_DTYPE),
        "status": _by_rows(num_rows, block_rows, (), np.dtype("uint8")),
        "block_count": _by_blocks(num_blocks, (), np.dtype("int64")),
        "block_mean": _by_blocks(num_blocks, token_shape, np.dtype("float64")),
        "block_m2": _by_blocks(num_blocks, token_shape, np.dtype("float64")),
    }
    _create(path, arrays)


def has_scatter(path: Path) -> bool:
    """Whether `create_scatter` was called on features.zarr."""
    return "block_scatter" in open_store(path)


def create_scatter(path: Path) -> None:
    """Add `block_scatter` float64 [blocks,C,C] to features.zarr: scatter matrix of the tokens of each block."""
    num_blocks, *_, width = array_of(open_store(path), "block_mean").shape
    _create(path, {"block_scatter": _by_blocks(num_blocks, (width, width), np.dtype("float64"))})


def create_regions(
    path: Path, *, num_rows: int, block_rows: int, grid: tuple[int, int], num_levels: int
) -> None:
    """Create regions.zarr: `regions` uint8 [N,L−1,H,W], `merges` float32 [N,T−1,3], `flags` uint8 [N] and `scores`
    float32 [N,2] (see `hierarchy.Hierarchy`).

    An existing store of the same shape is kept.
    """
    create_levels(path, num_rows=num_rows, block_rows=block_rows, grid=grid, num_levels=num_levels)
    arrays = {
        "merges": _by_rows(num_rows, block_rows, (grid[0] * grid[1] - 1, 3), np.dtype("float32")),
        "flags": _by_rows(num_rows, block_rows, (), np.dtype("uint8")),
        "scores": _by_rows(num_rows, block_rows, (2,), np.dtype("float32")),
    }
    _create(path, arrays)


def create_levels(
    path: Path, *, num_rows: int, block_rows: int, grid: tuple[int, int], num_levels: int
) -> None:
    """Create a store of `regions` alone, or add them to one."""
    _create(path, {"regions": _by_rows(num_rows, block_rows, (num_levels - 1, *grid), REGION_DTYPE)})


def create_prototypes(path: Path, *, num_rows: int, block_rows: int) -> None:
    """Add `prototypes` uint16 [N,256] to regions.zarr, nearest dataset-wide prototype of each part, by region id.

    `prototype_distances` float32 [N,256] holds the squared distances to them.
    """
    row = (MAX_REGIONS,)
    arrays = {
        "prototypes": _by_rows(num_rows, block_rows, row, np.dtype("uint16")),
        "prototype_distances": _by_rows(num_rows, block_rows, row, np.dtype("float32")),
    }
    _create(path, arrays)


def write_block(path: Path, block: Block, arrays: Mapping[str, np.ndarray]) -> None:
    """Write rows of `block` into each named array. Raises BuilderError on a wrong shape."""
    group = open_store(path, "r+")
    for name, values in arrays.items():
        target = array_of(group, name)
        expected = (len(block), *target.shape[1:])
        if values.shape != expected:
            raise BuilderError(
                f"{path}/{name}: block {block.number} has shape {values.shape}, expected {expected}"
            )
        target[block.start : block.stop] = values


def write_block_moments(path: Path, block: Block, moments: Moments) -> None:
    """Write count, mean and M2 (float64 [H,W,C]) of the usable rows of `block`."""
    group = open_store(path, "r+")
    array_of(group, "block_count")[block.number] = moments.count
    array_of(group, "block_mean")[block.number] = moments.mean
    array_of(group, "block_m2")[block.number] = moments.m2


def write_block_scatter(path: Path, block: Block, scatter: np.ndarray) -> None:
    """Write the scatter matrix (float64 [C,C]) of the usable tokens of `block`, about their mean."""
    array_of(open_store(path, "r+"), "block_scatter")[block.number] = scatter


def read_block_moments(path: Path, block: Block) -> Moments:
    """What `write_block_moments` wrote."""
    group, row = open_store(path), slice(block.number, block.number + 1)
    count, mean, m2 = (read_rows(group, name, row)[0] for name in ("block_count", "block_mean", "block_m2"))
    return Moments(int(count), mean, m2)


def read_block_scatter(path: Path, block: Block) -> np.ndarray:
    """What `write_block_scatter` wrote."""
    return read_rows(open_store(path), "block_scatter", slice(block.number, block.number + 1))[0]


def read_block(path: Path, name: str, block: Block) -> np.ndarray:
    """Rows of `block` of one array. Raises BuilderError when the stored bytes are damaged."""
    return read_rows(open_store(path), name, slice(block.start, block.stop))


def read_rows(group: zarr.Group, name: str, rows: slice | np.ndarray) -> np.ndarray:
    """Rows of one array; an index array must rise. Raises BuilderError when the stored bytes are damaged."""
    array = array_of(group, name)
    try:
        return np.asarray(array[rows] if isinstance(rows, slice) else array.oindex[rows])
    except (ValueError, RuntimeError) as error:
        raise BuilderError(
            f"{group.store_path}/{name}: rows are damaged ({error}): run `hierarchy-builder verify`"
        ) from None


def open_store(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """Open a store; raises BuilderError when it is missing or of another format version."""
    try:
        group = zarr.open_group(path, mode=mode)
    except (OSError, ValueError) as error:
        raise BuilderError(f"{path} is missing or not a zarr store: {error}") from None
    version = group.attrs.get("format_version")
    if version != FORMAT_VERSION:
        raise BuilderError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
    return group


def array_of(group: zarr.Group, name: str) -> zarr.Array:
    """One array of a store; raises BuilderError naming those there."""
    try:
        array = group[name]
    except KeyError:
        raise BuilderError(
            f"{group.store_path} has no array {name!r}, found {sorted(group.keys())}"
        ) from None
    except ValueError as error:
        raise BuilderError(
            f"{group.store_path}/{name} is damaged ({error}): start its stage over with --fresh"
        ) from None
    assert isinstance(array, zarr.Array)
    return array


def _by_rows(num_rows: int, block_rows: int, row: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    chunk = ROWS_PER_CHUNK if row and block_rows % ROWS_PER_CHUNK == 0 else block_rows
    return {
        "shape": (num_rows, *row),
        "shards": (block_rows, *row),
        "chunks": (chunk, *row),
        "dtype": dtype,
    }


def _by_blocks(num_blocks: int, value: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"shape": (num_blocks, *value), "chunks": (1, *value), "dtype": dtype}


def _create(path: Path, arrays: Mapping[str, dict[str, Any]]) -> None:
    try:
        group = zarr.open_group(path, mode="a", zarr_format=3)
        present = set(group.array_keys())
    except (OSError, ValueError) as error:
        raise BuilderError(f"{path} is damaged ({error}): start its stage over with --fresh") from None
    group.attrs["format_version"] = FORMAT_VERSION
    for name, layout in arrays.items():
        if name in present:
            if array_of(group, name).shape != layout["shape"]:
                raise BuilderError(
                    f"{path}/{name} has shape {array_of(group, name).shape}, expected {layout['shape']}: "
                    "start the stage over with --fresh"
                )
            continue
        group.create_array(
            name, fill_value=0, compressors=[ZstdCodec(level=1), Crc32cCodec()], overwrite=False, **layout
        )
