"""index.parquet: one row per image, in the order of rows of every store; extraction adds the outcome of each."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hierarchy_builder.errors import VerificationError
from hierarchy_builder.files import decoding, read_bytes, write_bytes
from hierarchy_builder.images.table import COLUMNS, ImageTable
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
CAME_LATER = ("file_hash",)
"""Columns that files of version 1 lack; they are read as null."""


def in_build_order(records: Sequence[ImageRecord], order: str) -> ImageTable:
    """Return records in the order of rows: as `listed`, or `shuffled` by the SHA-256 of their keys on any machine."""
    table = ImageTable.of(records)
    if order == "listed":
        return table
    digests = b"".join(hashlib.sha256(key.encode()).digest() for key in table.values("key"))
    return table.take(np.argsort(np.frombuffer(digests, "S32"), kind="stable"))


def write_index(
    path: Path, records: Sequence[ImageRecord], outcomes: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write the index as a whole; without `outcomes` every row is pending.

    outcomes: one mapping per row with `OUTCOME_COLUMNS`.
    """
    images = ImageTable.of(records)
    columns: dict[str, Any] = {name: images.column(name) for name in COLUMNS}
    if outcomes is None:
        empty = {name: pa.nulls(len(images), SCHEMA.field(name).type) for name in OUTCOME_COLUMNS}
        pending = pa.repeat(pa.scalar(status_name(Status.PENDING)), len(images))
        columns |= {**empty, "status": pending}
    else:
        for name in OUTCOME_COLUMNS:
            columns[name] = pa.array((row.get(name) for row in outcomes), SCHEMA.field(name).type)
    table = pa.table(columns, schema=SCHEMA)
    described = {"format_version": str(INDEX_VERSION), "rows_sha256": rows_digest(table)}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(described), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


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
        if pa.types.is_string(column.type):
            filled = column.fill_null("")
            digest.update(pc.binary_length(filled).to_numpy().astype("<i8").tobytes())
            for chunk in filled.chunks:
                digest.update(_text_of(chunk))
        else:
            digest.update(column.fill_null(0).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def settle_index(path: Path, listing: Path, outcomes: Sequence[Mapping[str, Any]]) -> None:
    """Write the index from the listing and these outcomes where it holds others: a run ended before it wrote it."""
    found = read_index(path).select(OUTCOME_COLUMNS).to_pylist() if path.exists() else []
    if found != [{name: row.get(name) for name in OUTCOME_COLUMNS} for row in outcomes]:
        write_index(path, records_of(read_index(listing)), outcomes)


def _text_of(strings: pa.StringArray) -> memoryview:
    """The bytes of strings without a null, joined."""
    _, offsets, text = strings.buffers()
    if text is None or not len(strings):
        return memoryview(b"")
    places = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text)[places[0] : places[-1]]


def records_of(table: pa.Table) -> ImageTable:
    """Return the rows of an index, or of a slice of it, as records."""
    return ImageTable(table)


def status_name(status: Status) -> str:
    """Return the name of a status in index.parquet, for example `ok`."""
    return status.name.lower()
