"""Rows of listings and indices: in a file where they are many, in any order, and read by row group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hierarchy_builder.images import table
from hierarchy_builder.images.table import COLLECTED, Collected, ImageTable, Spool, rows_at, sorted_by_path
from hierarchy_builder.records import ImageRecord
from hierarchy_builder.store import index
from hierarchy_builder.store.index import StoredIndex, in_build_order, read_index, write_index


def record(number: int) -> ImageRecord:
    name = f"{number:06d}"
    return ImageRecord(key=f"c/{name}", path=f"c/{name}.jpg", label=0, class_name="c", num_bytes=number)


def test_rows_of_many_images_lie_in_a_file_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "AT_ONCE", 1000)
    held = pa.default_memory_pool().bytes_allocated
    before, found = held(), Collected(None)
    for number in range(20_500):
        found.add(f"c/{number:06d}.jpg", "c", number)
    collected = found.table()
    labelled = collected.append_column("label", pa.array(np.zeros(len(collected), np.int32)))
    ordered = in_build_order(ImageTable(labelled), "shuffled")
    assert collected.nbytes > 900_000 < ordered.table.nbytes
    assert held() - before < 200_000, "of two tables no more than some rows and the labels are in memory"
    places = np.random.default_rng(0).permutation(len(collected))
    for wanted in (places, places[:3], places[:0], np.array([5, 5, 0])):
        assert rows_at(collected, wanted).equals(collected.take(pa.array(wanted, pa.int64())))
    assert sorted_by_path(ordered.table).select(["path"]).equals(collected.select(["path"]))


def test_a_spool_of_few_rows_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.tempfile, "TemporaryFile", None)
    spool = Spool(COLLECTED)
    assert spool.table().num_rows == 0
    spool.add(pa.RecordBatch.from_pylist([{"key": "a"}], COLLECTED))
    assert spool.table().column("key").to_pylist() == ["a"]
    assert spool.table().num_rows == 0


def test_rows_of_an_index_are_read_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_AT_ONCE", 10)
    path = tmp_path / "index.parquet"
    write_index(path, [record(number) for number in range(35)])
    whole, stored = read_index(path), StoredIndex(path, ["bytes", "path"])
    read = list[int]()
    group = stored._group
    monkeypatch.setattr(stored, "_group", lambda number, names: read.append(number) or group(number, names))
    for start, stop in ((0, 10), (3, 7), (8, 23), (20, 30), (30, 35), (34, 35)):
        assert stored.rows(start, stop).equals(whole.select(["bytes", "path"]).slice(start, stop - start))
    assert read == [0, 1, 2, 3], "each was read once"
    assert [stored.rows(place, place).num_rows for place in (0, 10, 15, 35)] == [0, 0, 0, 0]
    assert len(stored) == len(whole) == 35
