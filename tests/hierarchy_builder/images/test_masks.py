"""Label maps: found by the photo's name, cut as the photo, refused with a reason."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hierarchy_builder.errors import ImageError, UsageError
from hierarchy_builder.images.decoding import crop_square
from hierarchy_builder.images.masks import open_masks, read_mask

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)])


def labels_of(height: int, width: int) -> np.ndarray:
    """Four blobs of uneven size, ids 0 to 3."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    return (x + 0.2 * np.sin(6 * y) > 0.45) * 1 + (y + 0.2 * np.cos(5 * x) > 0.6) * 2


def save(path: Path, labels: np.ndarray, dtype: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(dtype)).save(path)
    return path


@pytest.mark.parametrize("size", [(320, 481), (481, 321), (64, 64), (100, 900), (1000, 90)])
@pytest.mark.parametrize("image_size_px", [224, 256])
def test_cells_are_sampled_at_the_positions_of_the_photo(tmp_path, size, image_size_px) -> None:
    labels = labels_of(*size)
    path = save(tmp_path / "a.png", labels)
    photo = crop_square(Image.fromarray(COLOURS[labels].astype(np.uint8)), image_size_px)
    cells = read_mask(path, size[::-1], image_size_px, (64, 64))
    at = ((np.arange(64) + 0.5) * image_size_px / 64).astype(int)
    seen = np.abs(photo[at[:, None], at, None].astype(int) - COLOURS).sum(axis=-1).argmin(axis=-1)
    values = np.unique(labels)
    assert cells.shape == (64, 64)
    assert (values[np.searchsorted(values, seen)] == cells).mean() > 0.97  # colours mix where segments meet


def test_label_zero_stays_and_others_are_renumbered_from_one(tmp_path) -> None:
    stripes = np.repeat([[0, 700, 40, 60000]], 8, axis=0).repeat(2, axis=1)
    cells = read_mask(save(tmp_path / "a.png", stripes, np.uint16), (8, 8), 8, (8, 8))
    assert cells[0].tolist() == [0, 0, 2, 2, 1, 1, 3, 3]
    cells = read_mask(save(tmp_path / "b.png", stripes + 5, np.uint16), (8, 8), 8, (8, 8))
    assert cells[0].tolist() == [1, 1, 3, 3, 2, 2, 4, 4]


@pytest.mark.parametrize(("photo", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_of_a_photo_and_its_map_may_be_composed_in_two_ways(tmp_path, photo, written) -> None:
    file = save(tmp_path / f"{unicodedata.normalize(written, 'café_2')}.png", np.ones((8, 8)))
    assert open_masks(tmp_path).of(f"été/{unicodedata.normalize(photo, 'café')}.jpg") == [file]


@pytest.mark.parametrize(
    ("labels", "reason", "text"),
    [
        (np.zeros((8, 9)), "wrong_size", "a.png has 9×8 pixels, expected 8×8 as its photo"),
        (np.zeros((8, 8, 3)), "not_a_label_map", "a.png has mode RGB"),
    ],
)
def test_map_of_other_size_or_mode_is_refused(tmp_path, labels, reason, text) -> None:
    with pytest.raises(ImageError, match=text) as caught:
        read_mask(save(tmp_path / "a.png", labels), (8, 8), 8, (8, 8))
    assert caught.value.reason == reason


def test_damaged_map_is_refused(tmp_path) -> None:
    path = save(tmp_path / "a.png", labels_of(200, 200))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ImageError, match=r"a\.png") as caught:
        read_mask(path, (200, 200), 8, (8, 8))
    assert caught.value.reason == "not_a_label_map"


def test_maps_of_a_photo_are_ordered_by_number(tmp_path) -> None:
    for name in ("7_0", "7_10", "7_2", "8", "cat/9_0"):
        save(tmp_path / f"{name}.png", np.zeros((8, 8)))
    masks = open_masks(tmp_path)
    assert [path.name for path in masks.of("7.jpg")] == ["7_0.png", "7_2.png", "7_10.png"]
    assert [path.name for path in masks.of("train/dog/8.jpeg")] == ["8.png"]
    assert [path.name for path in masks.of("train/cat/9.jpg")] == ["9_0.png"]
    assert masks.of("dog/9.jpg") == []
    masks.check_photos(["7.jpg", "8.jpg", "6.jpg"])


def test_read_returns_usable_maps_and_the_errors_of_others(tmp_path) -> None:
    save(tmp_path / "a_0.png", np.zeros((8, 8)))
    save(tmp_path / "a_1.png", np.zeros((8, 4)))
    masks = open_masks(tmp_path)
    maps, refused = masks.read("a.jpg", (8, 8), 8, (8, 8))
    assert maps.shape == (1, 8, 8)
    assert [error.reason for error in refused] == ["wrong_size"]
    maps, refused = masks.read("b.jpg", (8, 8), 8, (8, 8))
    assert (maps.shape, refused) == ((0, 8, 8), [])


def test_folder_without_matching_maps_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="contains no label maps"):
        open_masks(tmp_path)
    save(tmp_path / "x_0.png", np.zeros((8, 8)))
    masks = open_masks(tmp_path)
    with pytest.raises(
        UsageError, match=r"no map for any of 2 images: expected 1\.png or 1_0\.png for cat/1\.jpg"
    ):
        masks.check_photos(["cat/1.jpg", "cat/2.jpg"])
    with pytest.raises(UsageError, match=r"matches both cat/x\.jpg and dog/x\.jpg"):
        masks.check_photos(["cat/x.jpg", "dog/x.jpg"])
