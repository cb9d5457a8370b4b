"""index.parquet: one row per image, in the order of rows of every store; extraction adds the outcome of each."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files import write_bytes
from hierarchy_builder.records import FORMAT_VERSION, ImageRecord, Status

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
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
OUTCOME_COLUMNS = ("status", "reason", "width", "height", "mode", "frames", "orientation")


def in_build_order(records: Sequence[ImageRecord], order: str) -> list[ImageRecord]:
    """Return records in the order of rows: as `listed`, or `shuffled` by the SHA-256 of their keys on any machine."""
    if order == "listed":
        return list(records)
    return sorted(records, key=lambda record: hashlib.sha256(record.key.encode()).digest())


def write_index(
    path: Path, records: Sequence[ImageRecord], outcomes: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write the index as a whole; without `outcomes` every row is pending.

    outcomes: one mapping per row with `OUTCOME_COLUMNS`.
    """
    columns: dict[str, list[Any]] = {
        "key": [record.key for record in records],
        "path": [record.path for record in records],
        "label": [record.label for record in records],
        "class_name": [record.class_name for record in records],
        "bytes": [record.num_bytes for record in records],
    }
    rows = outcomes if outcomes is not None else [{"status": status_name(Status.PENDING)}] * len(records)
    for name in OUTCOME_COLUMNS:
        columns[name] = [row.get(name) for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_index(path: Path) -> pa.Table:
    """Read an index. Raises BuilderError when it is missing or damaged."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise BuilderError(
            f"{path} is missing or damaged ({error}): run `hierarchy-builder extract` again"
        ) from None


def records_of(table: pa.Table) -> list[ImageRecord]:
    """Return the rows of an index, or of a slice of it, as records."""
    columns = (table.column(name).to_pylist() for name in ("key", "path", "label", "class_name", "bytes"))
    return [
        ImageRecord(key=key, path=path, label=label, class_name=class_name, num_bytes=num_bytes)
        for key, path, label, class_name, num_bytes in zip(*columns, strict=True)
    ]


def status_name(status: Status) -> str:
    """Return the name of a status in index.parquet, for example `ok`."""
    return status.name.lower()
