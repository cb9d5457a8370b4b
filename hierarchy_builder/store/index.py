"""index.parquet: one row per image, in the order of rows of every store; extraction adds the outcome of each."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hierarchy_builder.errors import VerificationError
from hierarchy_builder.files import decoding, read_bytes, write_bytes
from hierarchy_builder.images.table import COLUMNS, ImageTable, give_back
from hierarchy_builder.records import ImageRecord, Status
from hierarchy_builder.remote import is_remote

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


class Outcomes(Sequence[Mapping[str, Any]]):
    """What became of every row, as columns: a mapping of what is told for each, empty for a row that is not done."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self.table = pa.Table.from_batches(batches, OUTCOMES)

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], count: int) -> pa.RecordBatch:
        """The columns of a unit of `count` rows, of which the first ones are told."""
        empty = [None] * (count - len(rows))
        columns = [
            pa.array([*(row.get(field.name) for row in rows), *empty], field.type) for field in OUTCOMES
        ]
        return pa.record_batch(columns, schema=OUTCOMES)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> list[Mapping[str, Any]]: ...

    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            assert step == 1
            return _told(self.table.slice(start, max(0, stop - start)))
        return _told(self.table.slice(place % len(self), 1))[0]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.table.to_batches():
            yield from _told(batch)


def _told(rows: pa.Table | pa.RecordBatch) -> list[Mapping[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None} for row in rows.to_pylist()]


def in_build_order(records: Sequence[ImageRecord], order: str) -> ImageTable:
    """Return records in the order of rows: as `listed`, or `shuffled` by the SHA-256 of their keys on any machine."""
    table = ImageTable.of(records)
    if order == "listed":
        return table
    digests = (hashlib.sha256(key.encode()).digest() for key in table.values("key"))
    firsts = np.fromiter((int.from_bytes(each[:8]) for each in digests), np.uint64, len(table))
    rows = np.argsort(firsts, kind="stable")
    if (firsts[rows][1:] == firsts[rows][:-1]).any():  # once in 10 million sets of a million keys
        whole = b"".join(hashlib.sha256(key.encode()).digest() for key in table.values("key"))
        rows = np.argsort(np.frombuffer(whole, "S32"), kind="stable")
    give_back()
    return table.take(rows)


def write_index(
    path: Path, records: Sequence[ImageRecord], outcomes: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write the index as a whole; without `outcomes` every row is pending.

    outcomes: one mapping per row with `OUTCOME_COLUMNS`.
    """
    images = ImageTable.of(records)
    columns: dict[str, Any] = {name: images.column(name) for name in COLUMNS}
    if isinstance(outcomes, Outcomes):
        columns |= {name: outcomes.table.column(name) for name in OUTCOME_COLUMNS}
    elif outcomes is None:
        empty = {name: pa.nulls(len(images), SCHEMA.field(name).type) for name in OUTCOME_COLUMNS}
        pending = pa.repeat(pa.scalar(status_name(Status.PENDING)), len(images))
        columns |= {**empty, "status": pending}
    else:
        for name in OUTCOME_COLUMNS:
            columns[name] = pa.array((row.get(name) for row in outcomes), SCHEMA.field(name).type)
    table = pa.table(columns)
    described = {"format_version": str(INDEX_VERSION), "rows_sha256": rows_digest(table)}
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA.with_metadata(described), compression="zstd") as writer:
        for start in range(0, len(table), ROWS_AT_ONCE):
            writer.write_table(table.slice(start, ROWS_AT_ONCE).cast(writer.schema))
    del table, columns
    write_bytes(path, buffer.getvalue())
    give_back()


def read_index(path: Path) -> pa.Table:
    """Read an index. Raises VerificationError when it is missing or its rows are not those that were written."""
    with decoding(path):
        table = pq.read_table(io.BytesIO(read_bytes(path)) if is_remote(path) else path)
        table.validate(full=True)
        described = table.schema.metadata or {}
        version = described.get(b"format_version", b"").decode()
        if version not in ("1", str(INDEX_VERSION)):
            raise ValueError(f"its format version is {version!r}, expected 1 to {INDEX_VERSION}")
        if version == "1":
            for name in CAME_LATER:
                table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"its columns are {table.schema.names}, expected {SCHEMA.names}")
        if any(column.null_count for column in table.columns[: SCHEMA.get_field_index("status") + 1]):
            raise ValueError("it lacks values of columns that no row lacks")
        if version != "1" and described.get(b"rows_sha256", b"").decode() != rows_digest(table):
            raise VerificationError(
                f"{path} is damaged (its rows do not have the checksum that they were written with): "
                "run `hierarchy-builder repair` on its build"
            )
    return table


def rows_digest(table: pa.Table) -> str:
    """Return the SHA-256 of all values by column, which `write_index` stores as `rows_sha256`.

    For each column: its name, which rows have a value, as bytes 0 and 1, and the values. Whole numbers are int64 with 0
    for none; of strings it takes their lengths in UTF-8 as int64, then all of them joined.
    """
    digest = hashlib.sha256()
    for name in SCHEMA.names:
        column = table.column(name)
        digest.update(name.encode())
        digest.update(column.is_valid().to_numpy().astype(np.uint8).tobytes())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            digest.update(pc.binary_length(column).fill_null(0).to_numpy().astype("<i8").tobytes())
            for chunk in column.chunks:
                digest.update(_text_of(chunk.fill_null("")))
        else:
            digest.update(column.fill_null(0).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def settle_index(path: Path, listing: Path, outcomes: Outcomes) -> None:
    """Write the index from the listing and these outcomes where it holds others: a run ended before it wrote it."""
    wanted = outcomes.table.select(OUTCOME_COLUMNS)
    if not path.exists() or read_index(path).select(OUTCOME_COLUMNS).cast(wanted.schema) != wanted:
        write_index(path, records_of(read_index(listing)), outcomes)


def _text_of(strings: pa.StringArray | pa.LargeStringArray) -> memoryview:
    """The bytes of strings without a null, joined."""
    _, offsets, text = strings.buffers()
    if text is None or not len(strings):
        return memoryview(b"")
    kind = np.int64 if pa.types.is_large_string(strings.type) else np.int32
    places = np.frombuffer(offsets, kind)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text)[places[0] : places[-1]]


def records_of(table: pa.Table) -> ImageTable:
    """Return the rows of an index, or of a slice of it, as records."""
    return ImageTable(table)


def status_name(status: Status) -> str:
    """Return the name of a status in index.parquet, for example `ok`."""
    return status.name.lower()
