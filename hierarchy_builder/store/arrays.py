"""The zarr stores of a build, features.zarr and regions.zarr, which are written one whole block at a time.

    N images, B rows in a block, H×W grid, C channels, L levels, T = H·W tokens

A block is one zarr shard of every array, so it has one writer and is replaced as a whole. Every chunk has a crc32c,
which zarr checks, and the marker of the unit that wrote a block tells which file holds it (`file_digest`): an emptied
or missing file would otherwise be read as zeros. `stored.py` compares the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore, StorePath

from hierarchy_builder.errors import BuilderError, VerificationError, or_none
from hierarchy_builder.files.remote import is_remote, store_error
from hierarchy_builder.files.untrusted.documents import parse_json, read_document
from hierarchy_builder.files.whole import decoding, repair_of, require_regular, sync
from hierarchy_builder.records import FEATURE_DTYPE, FORMAT_VERSION, MAX_REGIONS, REGION_DTYPE, Block
from hierarchy_builder.store.fetched import Fetched
from hierarchy_builder.store.statistics import Moments

GROUP = {"attributes": {"format_version": FORMAT_VERSION}, "node_type": "group", "zarr_format": 3}
"""Content of the `zarr.json` of a store."""
NOT_STORED = 2**64 - 1
"""Length that the index of a shard holds for a chunk of zeros, which is not stored."""
CHECKSUM_BYTES = 4
"""Bytes of a crc32c, the last ones of a chunk and of the index of a shard."""
ROWS_PER_CHUNK = 8
"""Rows of a chunk, which are read together; a block is a whole number of chunks or a single short one."""

MOMENTS = ("block_count", "block_mean", "block_m2")
"""Count, mean and sum of squared deviations of the usable rows of a block."""


class ArrayKind(NamedTuple):
    """The stage that writes an array, its dimensions, and its dtype."""

    stage: str
    dimensions: tuple[str, ...]
    dtype: np.dtype


ARRAYS = {
    "features": ArrayKind("extract", ("image", "row", "column", "channel"), FEATURE_DTYPE),
    "status": ArrayKind("extract", ("image",), np.dtype("uint8")),
    "block_count": ArrayKind("extract", ("block",), np.dtype("int64")),
    "block_mean": ArrayKind("extract", ("block", "row", "column", "channel"), np.dtype("float64")),
    "block_m2": ArrayKind("extract", ("block", "row", "column", "channel"), np.dtype("float64")),
    "block_scatter": ArrayKind("covariance", ("block", "channel", "other_channel"), np.dtype("float64")),
    "regions": ArrayKind("cluster", ("image", "level", "row", "column"), REGION_DTYPE),
    "merges": ArrayKind("cluster", ("image", "merge", "field"), np.dtype("float32")),
    "flags": ArrayKind("cluster", ("image",), np.dtype("uint8")),
    "scores": ArrayKind("cluster", ("image", "score"), np.dtype("float32")),
    "prototypes": ArrayKind("link", ("image", "region"), np.dtype("uint16")),
    "prototype_distances": ArrayKind("link", ("image", "region"), np.dtype("float32")),
}
"""The arrays of both stores. By the names of the dimensions `xarray.open_zarr` reads a store.

`block_scatter` is the scatter matrix of the tokens of a block. `hierarchy.Hierarchy` documents what `cluster` writes.
What `link` writes is the nearest prototype of each part, by region id, and the squared distance to it.
"""

Layout = dict[str, dict[str, Any]]
"""Shape, shards, chunks and dtype of the arrays of a store, by name."""


def stage_layout(
    stage: str, num_rows: int, block_rows: int, encoder: Mapping[str, Any], num_levels: int = 0
) -> Layout:
    """Return the arrays that a stage (or `covariance`) writes; none if it writes no arrays.

    encoder: its description, with `grid` and `width`.
    """
    height, width = encoder["grid"]
    sizes = {
        "image": num_rows,
        "block": -(-num_rows // block_rows),
        "row": height,
        "column": width,
        "channel": encoder["width"],
        "other_channel": encoder["width"],
        "level": num_levels - 1,
        "merge": height * width - 1,
        "field": 3,
        "score": 2,
        "region": MAX_REGIONS,
    }
    layout = Layout()
    for name, kind in ARRAYS.items():
        if kind.stage == stage:
            length, *row = (sizes[dimension] for dimension in kind.dimensions)
            layout[name] = {"shape": (length, *row), "dtype": kind.dtype}
            if kind.dimensions[0] == "block":
                layout[name]["chunks"] = (1, *row)
            else:
                chunk = ROWS_PER_CHUNK if row and block_rows % ROWS_PER_CHUNK == 0 else block_rows
                layout[name] |= {"shards": (block_rows, *row), "chunks": (chunk, *row)}
    return layout


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all values of some arrays, without compression."""
    return sum(math.prod(array["shape"]) * array["dtype"].itemsize for array in layout.values())


def has_scatter(path: Path) -> bool:
    """Whether features.zarr has scatter matrices, the array `block_scatter`."""
    return "block_scatter" in open_store(path)


def create(path: Path, layout: Layout) -> None:
    """Create the arrays of `layout` in the store `path`; arrays that exist are kept.

    Raises BuilderError when one of them has another shape or the store is damaged.
    """
    try:  # writes too, and what stops a write is no damage
        group = zarr.open_group(_place(path), mode="a", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if told := store_error(error):
            raise told from error
        raise VerificationError(f"{path} is damaged ({error}): {repair_of(path)}") from None
    if group.attrs.get("format_version") != FORMAT_VERSION:
        group.attrs["format_version"] = FORMAT_VERSION
    for name, array in layout.items():
        if (path / name / "zarr.json").exists():
            if array_of(group, name).shape != array["shape"]:
                raise BuilderError(
                    f"{path}/{name} has shape {array_of(group, name).shape}, expected {array['shape']}: "
                    "start the stage over with --fresh"
                )
            continue
        _create_array(group, name, array)
    for name in ("", *layout):
        sync(path / name / "zarr.json")
        sync(path / name)


def damaged_layout(path: Path, layout: Layout, group: zarr.Group | None = None) -> list[str]:
    """Return the names of arrays whose `zarr.json` is not as `create` writes it, and "." for that of the store.

    group: the store, where it is open already.
    """
    expected = zarr.create_group(MemoryStore(), zarr_format=3)
    damaged = [] if group is not None or or_none(open_store, path) is not None else ["."]
    place = StorePath(_place(path)) if group is None else group.store_path
    for name, array in layout.items():
        try:
            with decoding(path / name):
                found = zarr.open_array(place / name, mode="r", zarr_format=3).metadata.to_dict()
        except VerificationError:
            damaged.append(name)
            continue
        wanted = _create_array(expected, name, array).metadata.to_dict()
        if found.get("dimension_names") is None:  # written by an earlier release
            found["dimension_names"] = wanted["dimension_names"]
        if found != wanted:
            damaged.append(name)
    if "." not in damaged and parse_json(read_document(path / "zarr.json")) != GROUP:
        damaged.insert(0, ".")  # zarr overlooks other fields and values that are of no use here
    return damaged


def repair_layout(path: Path, layout: Layout) -> None:
    """Write every damaged `zarr.json` of a store again; the chunks stay as they are."""
    for name in damaged_layout(path, layout):
        (path / name / "zarr.json").unlink(missing_ok=True)
    create(path, layout)


def grow(path: Path, *, num_rows: int, num_blocks: int) -> None:
    """Enlarge all arrays of a store to more rows and blocks; their values are kept."""
    for name, array in open_store(path, "r+").arrays():
        length = num_blocks if name.startswith("block_") else num_rows
        if array.shape[0] < length:
            array.resize((length, *array.shape[1:]))
            sync(path / name / "zarr.json")


Written = dict[str, dict[str, str]]
"""What a marker tells of the arrays a unit wrote: `digests`, the SHA-256 of their values, and `files`."""


def write_block(path: Path, block: Block, arrays: Mapping[str, np.ndarray]) -> Written:
    """Write the rows of `block` into each named array, or its one value into a `block_` array, and synchronise them.

    Returns `digests` and `files` by array. Raises BuilderError on a wrong shape.
    """
    group, written = open_store(path, "r+"), Written(digests={}, files={})
    store, files = _store_of(group), list[Path]()
    for name, values in arrays.items():
        target, rows = array_of(group, name), rows_of(name, block)
        file = shard_file(path, name, block.number)
        expected = (rows.stop - rows.start, *target.shape[1:])
        if values.shape != expected:
            raise BuilderError(
                f"{path}/{name}: block {block.number} has shape {values.shape}, expected {expected}"
            )
        # zarr reads the last shard, which is short, before it writes it, and fails if the shard is damaged.
        if isinstance(store, Fetched):
            store.forget(file)  # it is replaced by one request, or removed where all values are 0
        else:
            file.unlink(missing_ok=True)
            files.append(file)
        target[rows] = values
        written["digests"][name] = _digest(values, target.dtype)
        written["files"][name] = file_digest(group, name, block.number)
    _sync_below(path, [file for file in files if file.exists()])
    return written


def _sync_below(path: Path, files: Sequence[Path]) -> None:
    """Wait until files and the folders between them and `path` are on disk.

    All are waited for at once: a file system then commits its journal a few times, not once for each.
    """
    folders = dict.fromkeys(folder for file in files for folder in file.parents if path in folder.parents)
    if places := [*files, *folders]:
        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(sync, places))


def shard_file(path: Path, name: str, number: int) -> Path:
    """Return the file that holds the rows of block `number` of one array; there is none where all values are 0."""
    return path.joinpath(name, "c", str(number), *"0" * (len(ARRAYS[name].dimensions) - 1))


def file_digest(group: zarr.Group, name: str, number: int) -> str:
    """Return the SHA-256 over the length, the index and the crc32c of every chunk of the file of a block.

    Since zarr checks a chunk and the index with their crc32c when it reads them, this stands for every byte of the file
    and costs a few small reads. A file that is not there gives the digest of an empty one.
    """
    digest = hashlib.sha256()
    with _content(group, name, number) as content:
        if content is not None:
            length = content.seek(0, os.SEEK_END)
            index, places = _shard_index(content, array_of(group, name))
            digest.update(length.to_bytes(8, "little") + index)
            for offset, size in places[places[:, 1] != NOT_STORED].tolist():
                if offset + size <= length and size >= CHECKSUM_BYTES:  # else the index itself is damaged
                    content.seek(offset + size - CHECKSUM_BYTES)
                    digest.update(content.read(CHECKSUM_BYTES))
    return digest.hexdigest()


def _content(group: zarr.Group, name: str, number: int) -> contextlib.AbstractContextManager[BinaryIO | None]:
    """The content of the file of a block, open for reading; None where there is none. An object is fetched whole."""
    store = _store_of(group)
    file = shard_file(store.root, name, number)
    if isinstance(store, Fetched):
        data = store.content(file)
        return contextlib.nullcontext(None if data is None else io.BytesIO(data))
    return file.open("rb") if file.is_file() else contextlib.nullcontext()


def _shard_index(content: BinaryIO, array: zarr.Array) -> tuple[bytes, np.ndarray]:
    """Return the bytes at the end of the file of a shard, and offset and length of each chunk, uint64 [chunks, 2]."""
    length = content.seek(0, os.SEEK_END)
    if array.shards is None:  # the file of a `block_` array is one chunk
        return b"", np.array([[0, length]], np.uint64)
    per_shard = array.shards[0] // array.chunks[0]
    index_bytes = 16 * per_shard + CHECKSUM_BYTES
    content.seek(max(0, length - index_bytes))
    index = content.read()
    whole = index.ljust(index_bytes, b"\0")
    return index, np.frombuffer(whole[: 16 * per_shard], "<u8").reshape(per_shard, 2)


def moment_arrays(moments: Moments) -> dict[str, np.ndarray]:
    """Return the arrays of count, mean and M2 (float64 [H,W,C]) of the usable rows of a block, for `write_block`."""
    values = zip(MOMENTS, (moments.count, moments.mean, moments.m2), strict=True)
    return {name: np.asarray(value)[None] for name, value in values}


def read_written(group: zarr.Group, name: str, block: Block) -> tuple[np.ndarray, str]:
    """Return what `read_block` reads, and its SHA-256."""
    values = read_rows(group, name, rows_of(name, block))
    return values, _digest(values, values.dtype)


def read_block(path: Path, name: str, block: Block) -> np.ndarray:
    """Return the rows of `block` of one array, one of a `block_` array. Raises BuilderError when they are damaged."""
    return read_rows(open_store(path), name, rows_of(name, block))


def read_rows(group: zarr.Group, name: str, rows: slice | np.ndarray) -> np.ndarray:
    """Return rows of one array; an index array must rise. Raises BuilderError when they are damaged."""
    array = array_of(group, name)
    with decoding(f"{group.store_path}/{name}: rows are"):
        return np.asarray(array[rows] if isinstance(rows, slice) else array.oindex[rows])


def chunk_bytes(path: Path, name: str) -> np.ndarray:
    """Return the bytes of each chunk of an array on disk, int64 in the order of rows; 0 where all values are 0.

    The file of a shard ends with an index: offset and length of each of its chunks, and a checksum.
    """
    group = open_store(path)
    array = array_of(group, name)
    assert array.shards is not None
    per_shard = array.shards[0] // array.chunks[0]
    sizes = np.zeros((-(-array.shape[0] // array.shards[0]), per_shard), np.int64)
    for number, row in enumerate(sizes):
        with _content(group, name, number) as content:
            if content is not None:
                found = _shard_index(content, array)[1][:, 1]
                row[:] = np.where(found == NOT_STORED, 0, found)
    return sizes.ravel()[: -(-array.shape[0] // array.chunks[0])]


def open_store(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """Open a store. Raises BuilderError when it is missing, damaged or of another format version."""
    with decoding(path):
        group = zarr.open_group(_place(path), mode=mode, zarr_format=3)
    version = group.attrs.get("format_version")
    if version != FORMAT_VERSION:
        raise BuilderError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
    return group


def _place(path: Path) -> Store:
    """What zarr opens: the store of a local path or of a URL."""
    return Fetched.of(path) if is_remote(path) else _Files(path)


class _Files(LocalStore):
    """A local store that reads regular files only, see `require_regular`."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.opened = dict[str, zarr.Array]()  # see `array_of`

    async def get(self, key: str, *arguments: Any, **more: Any) -> Buffer | None:
        self._check(key)
        return await super().get(key, *arguments, **more)

    def get_sync(self, key: str, **more: Any) -> Buffer | None:
        self._check(key)
        return super().get_sync(key, **more)

    def _check(self, key: str) -> None:
        path = self.root / key
        if not path.is_dir():  # a group or an array, of which zarr reads nothing itself
            require_regular(path)


def _store_of(group: zarr.Group) -> _Files | Fetched:
    return cast(_Files | Fetched, group.store)


def array_of(group: zarr.Group, name: str) -> zarr.Array:
    """Return one array of a store. Raises BuilderError naming the arrays that exist if it is missing.

    Its description is read once while the store is open, which takes longer than to read a small block.
    """
    opened = _store_of(group).opened
    if name in opened:
        return opened[name]
    with decoding(f"{group.store_path}/{name} is"):
        try:
            array = group[name]
        except KeyError:
            raise VerificationError(
                f"{group.store_path} has no array {name!r}, found {sorted(group.keys())}: "
                "run `hierarchy-builder repair` on its build"
            ) from None
        if not isinstance(array, zarr.Array):
            raise TypeError("it is no array")
    opened[name] = array
    return array


def rows_of(name: str, block: Block) -> slice:
    """Return where one array holds the values of `block`."""
    if ARRAYS[name].dimensions[0] == "block":
        return slice(block.number, block.number + 1)
    return slice(block.start, block.stop)


def _create_array(group: zarr.Group, name: str, layout: dict[str, Any]) -> zarr.Array:
    return group.create_array(
        name,
        fill_value=0,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        dimension_names=ARRAYS[name].dimensions,
        overwrite=False,
        **layout,
    )


def _digest(values: np.ndarray, dtype: np.dtype) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype).data).hexdigest()
