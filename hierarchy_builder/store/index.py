"""index.parquet: one row per image, in the order of rows of every store; extraction adds the outcome of each."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hierarchy_builder.errors import VerificationError
from hierarchy_builder.files.remote import is_remote
from hierarchy_builder.files.whole import atomic_file, decoding, read_bytes
from hierarchy_builder.images.table import COLUMNS, ImageTable, Spool, give_back
from hierarchy_builder.records import ImageRecord, Status

INDEX_VERSION = 2
"""Version of index.parquet and of the listing. Those of version 1 have no `file_hash` and no checksum."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("mode", pa.string()),
        pa.field("frames", pa.int32()),
        pa.field("orientation", pa.int8()),
        pa.field("file_hash", pa.string()),
    ]
)
OUTCOME_COLUMNS = tuple(SCHEMA.names[SCHEMA.get_field_index("status") :])
OUTCOMES = pa.schema(
    [*(SCHEMA.field(name).with_nullable(True) for name in OUTCOME_COLUMNS), pa.field("modified", pa.int64())]
)
ROWS_AT_ONCE = 2**17
"""Rows of a row group: so many are copied at a time while an index is written."""
CAME_LATER = ("file_hash",)
"""Columns that files of version 1 lack; they are read as null."""


def outcomes_of(rows: Sequence[Mapping[str, Any]], count: int) -> pa.RecordBatch:
    """What became of the `count` rows of a unit, as columns; only the first of them are told, by mappings."""
    empty = [None] * (count - len(rows))
    columns = [pa.array([*(row.get(field.name) for row in rows), *empty], field.type) for field in OUTCOMES]
    return pa.record_batch(columns, schema=OUTCOMES)


def joined(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """What became of the rows of all units, with columns `OUTCOMES`; all are null in a row that is not done."""
    spool = Spool(OUTCOMES)
    for batch in batches:
        spool.add(batch)
    return spool.table()


def in_build_order(records: Sequence[ImageRecord], order: str) -> ImageTable:
    """Return records in the order of rows: as `listed`, or `shuffled` by the SHA-256 of their keys on any machine."""
    table = ImageTable.of(records)
    return table if order == "listed" else table.take(_shuffled(table))


def _shuffled(table: ImageTable) -> np.ndarray:
    digests = (hashlib.sha256(key.encode()).digest() for key in table.values("key"))
    firsts = np.fromiter((int.from_bytes(each[:8]) for each in digests), np.uint64, len(table))
    rows = np.argsort(firsts, kind="stable")
    rising = firsts[rows]
    if (rising[1:] == rising[:-1]).any():  # once in 10 million sets of a million keys
        whole = b"".join(hashlib.sha256(key.encode()).digest() for key in table.values("key"))
        rows = np.argsort(np.frombuffer(whole, "S32"), kind="stable")
    return rows


def write_index(path: Path, records: Sequence[ImageRecord], outcomes: pa.Table | None = None) -> None:
    """Write the index as a whole. outcomes: columns `OUTCOMES` of the first rows; rows without a status are pending."""
    images, told = ImageTable.of(records), OUTCOMES.empty_table() if outcomes is None else outcomes

    def group(name: str, start: int) -> pa.ChunkedArray:
        """A column of a row group; columns made whole would take the memory of the images again."""
        kind, count = SCHEMA.field(name).type, min(ROWS_AT_ONCE, len(images) - start)
        if name in COLUMNS:
            return images.table.column(name).slice(start, count).cast(kind)
        known = told.column(name).slice(min(start, len(told)), count)
        rows = pa.chunked_array([*known.chunks, pa.nulls(count - len(known), kind)])
        return rows.fill_null(status_name(Status.PENDING)) if name == "status" else rows

    starts = range(0, len(images), ROWS_AT_ONCE)
    digest = _rows_digest(lambda name: lambda: (group(name, start) for start in starts))
    schema = SCHEMA.with_metadata({"format_version": str(INDEX_VERSION), "rows_sha256": digest})
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in starts:
            writer.write_table(pa.table([group(name, start) for name in schema.names], schema=schema))
            give_back()


class StoredIndex:
    """An index on disk, or some of its columns: all are checked once, then rows are read by their row groups.

    Raises VerificationError when it is missing or its rows are not those that were written.
    """

    def __init__(self, path: Path, names: Sequence[str] = tuple(SCHEMA.names)) -> None:
        self.path, self.names = path, names
        with decoding(path):
            self._file = pq.ParquetFile(io.BytesIO(read_bytes(path)) if is_remote(path) else path)
            described = self._file.schema_arrow.metadata or {}
            version = described.get(b"format_version", b"").decode()
            if version not in ("1", str(INDEX_VERSION)):
                raise ValueError(f"its format version is {version!r}, expected 1 to {INDEX_VERSION}")
            self._later = CAME_LATER if version == "1" else ()
            present = pa.schema([field for field in SCHEMA if field.name not in self._later])
            if not self._file.schema_arrow.equals(present):
                raise ValueError(f"its columns are {self._file.schema_arrow.names}, expected {present.names}")
            groups = range(self._file.num_row_groups)
            counts = [self._file.metadata.row_group(number).num_rows for number in groups]
            self._starts = np.cumsum([0, *counts])
            digest = _rows_digest(lambda name: lambda: (self._group(number, [name])[0] for number in groups))
            if version != "1" and described.get(b"rows_sha256", b"").decode() != digest:
                raise VerificationError(
                    f"{path} is damaged (its rows do not have the checksum that they were written with): "
                    "run `hierarchy-builder repair` on its build"
                )
        self._held = dict[int, pa.Table]()
        give_back()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` ≤ i < `stop`. The row groups that hold them are kept for the next call."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        with decoding(self.path):
            held = {
                number: self._held.get(number) or self._group(number, self.names)
                for number in range(first, last + 1)
            }
        self._held, begin = held, start - int(self._starts[first])
        empty = pa.schema([SCHEMA.field(name) for name in self.names]).empty_table()
        return pa.concat_tables([empty, *held.values()]).slice(begin, stop - start)

    def _group(self, number: int, names: Sequence[str]) -> pa.Table:
        rows = self._file.read_row_group(number, [name for name in names if name not in self._later])
        for place, name in enumerate(names):
            if name in self._later:
                rows = rows.add_column(
                    place, SCHEMA.field(name), pa.nulls(len(rows), SCHEMA.field(name).type)
                )
        rows.validate(full=True)
        if any(rows.column(name).null_count and not SCHEMA.field(name).nullable for name in names):
            raise ValueError("it lacks values of columns that no row lacks")
        return rows.select(names).replace_schema_metadata()


def read_index(path: Path, names: Sequence[str] = tuple(SCHEMA.names)) -> pa.Table:
    """Read an index or some of its columns as a whole; see `StoredIndex`."""
    stored = StoredIndex(path, names)
    return stored.rows(0, len(stored))


def read_images(path: Path) -> ImageTable:
    """Read the images of an index without their outcomes; see `read_index`."""
    return ImageTable(read_index(path, COLUMNS))


def _rows_digest(column: Callable[[str], Callable[[], Iterable[pa.ChunkedArray]]]) -> str:
    """Return the SHA-256 of all values by column, which `write_index` stores as `rows_sha256`.

    For each column: its name, which rows have a value, as bytes 0 and 1, and the values. Whole numbers are int64 with 0
    for none; of strings it takes their lengths in UTF-8 as int64, then all of them joined.
    column: called once for each name; what it returns gives the pieces of the column each time that it is called.
    """
    digest = hashlib.sha256()
    for field in SCHEMA:
        digest.update(field.name.encode())
        is_text, pieces = pa.types.is_string(field.type), column(field.name)
        for piece in pieces():
            digest.update(piece.is_valid().to_numpy().astype(np.uint8))
        for piece in pieces():
            numbers = pc.binary_length(piece) if is_text else piece
            digest.update(numbers.fill_null(0).to_numpy().astype("<i8"))
        for piece in pieces() if is_text else ():
            for chunk in piece.chunks:
                digest.update(_text_of(chunk.fill_null("")))
    return digest.hexdigest()


def settle_index(path: Path, listing: Path, outcomes: pa.Table) -> None:
    """Write the index from the listing and these outcomes where it holds others: a run ended before it wrote it."""
    wanted = outcomes.select(OUTCOME_COLUMNS)
    if not path.exists() or read_index(path, OUTCOME_COLUMNS).cast(wanted.schema) != wanted:
        write_index(path, read_images(listing), outcomes)


def _text_of(strings: pa.StringArray) -> memoryview:
    """The bytes of strings without a null, joined."""
    _, offsets, text = strings.buffers()
    if text is None or not len(strings):
        return memoryview(b"")
    places = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text)[places[0] : places[-1]]


def status_name(status: Status) -> str:
    """Return the name of a status in index.parquet, for example `ok`."""
    return status.name.lower()
