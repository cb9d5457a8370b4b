"""The images of a listing as columns, which take a fifth of the memory of as many records."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hierarchy_builder.config import Partition
from hierarchy_builder.images.keys import HASHED, plain_key
from hierarchy_builder.records import ImageRecord

AT_ONCE = 65_536
"""Images that are held as objects of Python at a time."""
COLUMNS = ("key", "path", "label", "class_name", "bytes")
"""Columns of the table, those of index.parquet, in the order of the fields of `ImageRecord`."""
COMPARED = ("path", "bytes", "label", "class_name")
"""Columns in which an image of one listing may differ from the same image of another."""
TEXT = pa.large_string()
"""Kind of columns of text: those of another kind hold 2 GiB at most when they are sorted."""
COLLECTED = pa.schema({"key": TEXT, "path": TEXT, "class_name": pa.int32(), "bytes": pa.int64()})
"""What is collected of an image; its class as the number of a name."""
Size = int | Callable[[], int]
"""Size of a file in bytes, or a call that asks for it."""


pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps far more of what was freed

_MAPPED = weakref.WeakSet[mmap.mmap]()
"""The files of rows that are mapped, see `Spool`."""


def give_back() -> None:
    """Give freed memory and pages of mapped files back to the system; a peak lasts until the process ends otherwise."""
    pa.default_memory_pool().release_unused()
    for mapped in list(_MAPPED):
        mapped.madvise(mmap.MADV_DONTNEED)


def in_batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """The rows of a table some at a time; the pages of those that were read are given back, see `give_back`."""
    for batch in table.to_batches(AT_ONCE):
        yield batch
        give_back()


class Spool:
    """Rows that are collected in a temporary file without a name and mapped from there, so that memory does not grow.

    A single batch stays in memory.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._file: BinaryIO | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows at the end."""
        self._batches.append(batch)
        if len(self._batches) > 1:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `table`)
                self._writer = pa.ipc.new_stream(self._file, self._schema)
            for each in self._batches:
                self._writer.write_batch(each)
            self._batches.clear()

    def table(self) -> pa.Table:
        """The rows that were added; the spool is empty then."""
        rows, self._batches = pa.Table.from_batches(self._batches, self._schema), []
        if self._file is None:
            return rows
        with self._file:
            with self._writer:
                self._writer.write_table(rows)
            self._file.flush()
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file = None
        _MAPPED.add(mapped)
        return pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))).read_all()


def rows_at(table: pa.Table, places: np.ndarray) -> pa.Table:
    """The rows of a table at these places, in this order, copied `AT_ONCE` at a time into a `Spool`."""
    spool, batches = Spool(table.schema), table.to_batches()
    starts = np.cumsum([0, *map(len, batches)])
    for first in range(0, len(places), AT_ONCE):
        wanted = places[first : first + AT_ONCE].astype(np.int64)
        order = np.argsort(wanted)
        rising, back = wanted[order], np.empty_like(order)
        back[order] = np.arange(len(order))
        cuts = np.searchsorted(rising, starts)
        parts = [
            batch.take(pa.array(rising[cut:end] - start))
            for batch, start, cut, end in zip(batches, starts, cuts, cuts[1:], strict=False)
        ]
        rows = pa.Table.from_batches(parts, table.schema).combine_chunks().take(pa.array(back))
        for batch in rows.to_batches():
            spool.add(batch)
    return spool.table()


def sorted_by_path(table: pa.Table) -> pa.Table:
    """The rows in the order of their paths; nothing is copied where they are in it already."""
    paths = table.column("path")
    if pc.all(pc.less_equal(paths[:-1], paths[1:])).as_py() is not False:
        return table
    return rows_at(table, pc.sort_indices(paths).to_numpy())


def describe_changes(before: ImageTable, now: ImageTable) -> str:
    """Return which images of a listing are gone, new, or of another size or class in a later one; empty if none are."""
    left, right = before.table.select(COMPARED), now.table.select(COMPARED)
    place = pc.index_in(left.column("path"), value_set=right.column("path"))
    is_new = pc.is_null(pc.index_in(right.column("path"), value_set=left.column("path")))
    kept, then = left.filter(pc.is_valid(place)), right.take(pc.drop_null(place))
    is_other = reduce(pc.or_, (pc.not_equal(kept.column(name), then.column(name)) for name in COMPARED[1:]))
    found = {
        "of another size or class": kept.filter(is_other),
        "gone": left.filter(pc.is_null(place)),
        "new": right.filter(is_new),
    }
    return ", ".join(_told(name, rows.column("path")) for name, rows in found.items() if rows.num_rows)


def _told(what: str, paths: pa.ChunkedArray) -> str:
    count, more = len(paths), " …" if len(paths) > 5 else ""
    return f"{count:,} {'is' if count == 1 else 'are'} {what} ({', '.join(paths[:5].to_pylist())}{more})"


class ImageTable(Sequence[ImageRecord]):
    """Images in an order, read as records one by one or as columns of Arrow."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.select(COLUMNS)
        for place, kind in enumerate(self.table.schema.types):
            if pa.types.is_string(kind):
                column = self.table.column(place).cast(TEXT)
                self.table = self.table.set_column(place, COLUMNS[place], column)

    @classmethod
    def of(cls, records: Iterable[ImageRecord]) -> ImageTable:
        """The table of these records."""
        if isinstance(records, ImageTable):
            return records
        rows = list(records)
        values = ([getattr(row, each.name) for row in rows] for each in fields(ImageRecord))
        kinds = (TEXT, TEXT, pa.int32(), TEXT, pa.int64())
        arrays = [pa.array(column, kind) for column, kind in zip(values, kinds, strict=True)]
        return cls(pa.table(arrays, names=COLUMNS))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, place: slice) -> ImageTable: ...

    def __getitem__(self, place: int | slice) -> ImageRecord | ImageTable:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step == 1:
                return ImageTable(self.table.slice(start, max(0, stop - start)))
            return self.take(np.arange(start, stop, step))
        if not -len(self) <= place < len(self):
            raise IndexError(f"image {place} of {len(self)}")
        return next(iter(self[place % len(self) :][:1]))

    def __iter__(self) -> Iterator[ImageRecord]:
        for batch in in_batches(self.table):
            for key, path, label, class_name, size in zip(
                *(column.to_pylist() for column in batch.columns), strict=True
            ):
                yield ImageRecord(key=key, path=path, label=label, class_name=class_name, num_bytes=size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageTable):
            return NotImplemented
        return all(self.column(name).equals(other.column(name)) for name in COLUMNS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<ImageTable of {len(self):,} images>"

    def column(self, name: str) -> pa.ChunkedArray:
        """A column; names of classes as plain strings."""
        column = self.table.column(name)
        return column.cast(TEXT) if pa.types.is_dictionary(column.type) else column

    def values(self, name: str) -> Iterator[Any]:
        """The values of a column, one after the other."""
        for batch in in_batches(self.table.select([name])):
            yield from batch.column(0).to_pylist()

    def by_path(self) -> ImageTable:
        """The images in the order of their paths."""
        return ImageTable(sorted_by_path(self.table))

    def take(self, rows: np.ndarray) -> ImageTable:
        """The images at these places, in their order."""
        return ImageTable(rows_at(self.table, rows))

    def relabelled(self, ids: Mapping[str, int]) -> ImageTable:
        """The same images with the ids that their classes have now."""
        chunks = []
        for chunk in self.table.column("class_name").dictionary_encode().chunks:
            known = pa.array([ids[name] for name in chunk.dictionary.to_pylist()], pa.int32())
            chunks.append(known.take(chunk.indices))
        place = self.table.schema.get_field_index("label")
        return ImageTable(self.table.set_column(place, "label", pa.chunked_array(chunks, pa.int32())))


class Collected:
    """Images as they are found: path, class, size and plain key; those of other partitions are only counted.

    Of these, the keys are kept that an image of this partition could get when it is told apart by a hash.
    """

    def __init__(self, partition: Partition | None) -> None:
        self.partition = partition
        self.total = 0
        """Images that were found, in all partitions."""
        self._classes: dict[str, int] = {}
        self._elsewhere: dict[str, str | None] = {}
        """Such a key → the path of its one image, None if several images share the key."""
        self._spool = Spool(COLLECTED)
        self._begin()

    def _begin(self) -> None:
        self._keys: list[str] = []
        self._paths: list[str] = []
        self._numbers, self._sizes = array("i"), array("q")

    def add(self, path: str, class_name: str, size: Size) -> bool:
        """Add an image unless it belongs to another partition, and return whether it was added."""
        self.total += 1
        number = self._classes.setdefault(class_name, len(self._classes))
        key = plain_key(path, class_name)
        if self.partition is not None and not self.partition.takes(key):
            if (hashed := HASHED.search(key)) and self.partition.takes(key[: hashed.start()]):
                self._elsewhere[key] = path if self._elsewhere.get(key, path) == path else None
            return False
        self._keys.append(key)
        self._paths.append(path)
        self._numbers.append(number)
        self._sizes.append(size if isinstance(size, int) else size())
        if len(self._keys) == AT_ONCE:
            self._flush()
        return True

    @property
    def classes(self) -> list[str]:
        """Names of the classes of all images that were found, in the order in which they were."""
        return list(self._classes)

    @property
    def elsewhere(self) -> list[str]:
        """Keys of other partitions that no image of this one may get, see `keys.unique_keys`."""
        return [key for key, path in self._elsewhere.items() if path is not None]

    def table(self) -> pa.Table:
        """The images of the partition: columns `key`, `path`, `class_name` (a dictionary) and `bytes`.

        They are given away: another call has only those that were added since.
        """
        self._flush()
        table = self._spool.table()
        names = pa.array(list(self._classes), pa.string())
        numbers = table.column("class_name")
        encoded = [pa.DictionaryArray.from_arrays(chunk, names) for chunk in numbers.chunks]
        kind = pa.dictionary(pa.int32(), pa.string())
        return table.set_column(2, "class_name", pa.chunked_array(encoded, kind))

    def _flush(self) -> None:
        columns = [
            pa.array(self._keys, TEXT),
            pa.array(self._paths, TEXT),
            pa.array(np.frombuffer(self._numbers, np.int32) if self._numbers else [], pa.int32()),
            pa.array(np.frombuffer(self._sizes, np.int64) if self._sizes else [], pa.int64()),
        ]
        self._spool.add(pa.record_batch(columns, schema=COLLECTED))
        self._begin()
