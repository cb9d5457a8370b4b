"""Whole blocks in, the same blocks out; damage is an error and not a wrong number."""

import json

import numpy as np
import pytest
import zarr

from hierarchy_builder.errors import BuilderError
from hierarchy_builder.records import Block, blocks_of
from hierarchy_builder.store import arrays as stores


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "features.zarr"
    stores.create(path, stores.stage_layout("extract", 21, 8, {"grid": (2, 3), "width": 4}))
    return path


def test_blocks_cover_every_row_once() -> None:
    blocks = blocks_of(21, 8)
    assert [(block.start, block.stop) for block in blocks] == [(0, 8), (8, 16), (16, 21)]
    assert blocks_of(0, 8) == []


def test_round_trip_in_any_order(path) -> None:
    values = np.random.default_rng(0).normal(size=(21, 2, 3, 4)).astype(np.float16)
    for block in reversed(blocks_of(21, 8)):
        stores.write_block(path, block, {"features": values[block.start : block.stop]})
    for block in blocks_of(21, 8):
        np.testing.assert_array_equal(
            stores.read_block(path, "features", block), values[block.start : block.stop]
        )


def test_create_keeps_existing_arrays(path) -> None:
    block = Block(number=0, start=0, stop=8)
    stores.write_block(path, block, {"status": np.ones(8, np.uint8)})
    stores.create(path, stores.stage_layout("extract", 21, 8, {"grid": (2, 3), "width": 4}))
    assert stores.read_block(path, "status", block).all()
    with pytest.raises(BuilderError, match=r"shape \(21, 2, 3, 4\), expected \(20, 2, 3, 4\).*--fresh"):
        stores.create(path, stores.stage_layout("extract", 20, 8, {"grid": (2, 3), "width": 4}))


def test_wrong_shape_is_refused(path) -> None:
    with pytest.raises(BuilderError, match=r"block 1 has shape \(7,\), expected \(8,\)"):
        stores.write_block(path, Block(number=1, start=8, stop=16), {"status": np.ones(7, np.uint8)})


def test_every_flipped_byte_is_noticed(path) -> None:
    block = Block(number=0, start=0, stop=8)
    values = np.random.default_rng(1).normal(size=(8, 2, 3, 4)).astype(np.float16)
    stores.write_block(path, block, {"features": values})
    (chunk,) = (entry for entry in (path / "features" / "c").rglob("*") if entry.is_file())
    whole = chunk.read_bytes()
    for position in np.linspace(0, len(whole) - 1, 40).astype(int):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        chunk.write_bytes(damaged)
        with pytest.raises(BuilderError, match="damaged"):
            stores.read_block(path, "features", block)
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BuilderError, match="damaged"):
        stores.read_block(path, "features", block)


def test_missing_store_and_array_are_named(path, tmp_path) -> None:
    with pytest.raises(BuilderError, match=r"nowhere\.zarr is missing"):
        stores.open_store(tmp_path / "nowhere.zarr")
    with pytest.raises(BuilderError, match="no array 'regions', found"):
        stores.read_block(path, "regions", Block(number=0, start=0, stop=8))


def test_store_with_foreign_description_is_damaged(tmp_path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("[1, 2]")
    with pytest.raises(BuilderError, match=r"a\.zarr is damaged"):
        stores.open_store(tmp_path / "a.zarr")


def test_every_field_of_the_description_of_a_store_is_compared(path) -> None:
    layout = stores.stage_layout("extract", 21, 8, {"grid": (2, 3), "width": 4})
    described = path / "zarr.json"
    whole = described.read_bytes()
    described.write_bytes(whole.replace(b'"zarr_format"', b'"zarr_fosmat"'))
    assert stores.damaged_layout(path, layout) == ["."]
    stores.repair_layout(path, layout)
    assert described.read_bytes() == whole


def test_arrays_name_their_dimensions_and_earlier_stores_without_names_are_whole(tmp_path) -> None:
    layout = stores.stage_layout("cluster", 4, 4, {"grid": (3, 2), "width": 8}, 4)
    stores.create(tmp_path / "regions.zarr", layout)
    array = zarr.open_group(tmp_path / "regions.zarr")["regions"]
    assert array.metadata.dimension_names == ("image", "level", "row", "column")
    for name in layout:
        described = tmp_path / "regions.zarr" / name / "zarr.json"
        content = json.loads(described.read_text())
        del content["dimension_names"]
        described.write_text(json.dumps(content))
    assert stores.damaged_layout(tmp_path / "regions.zarr", layout) == []
