"""Decoding and cropping: every odd picture, turned upright, in RGB, cut as the release cuts."""

import contextlib
import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import NOISE, encoded
from PIL import Image

from hierarchy_builder.errors import ImageError
from hierarchy_builder.images import decoding
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.sources import open_source


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_file_is_refused(image_format: str) -> None:
    data = encoded(NOISE, image_format)
    image, facts = decode_image(data)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert (facts.width, facts.height, facts.frames, facts.orientation) == (60, 40, 1, 1)
    for share in (0.4, 0.7, 0.95):
        assert reason(data[: int(len(data) * share)]) == "truncated"


def test_file_that_is_no_image_is_refused_with_its_reason() -> None:
    assert reason(b"") == "empty"
    assert reason(b"<html>moved</html>") == "not_an_image"


def test_size_is_checked_before_pixels_are_read() -> None:
    data = encoded(NOISE)
    assert reason(data[:60], max_pixels=2399) == "too_large"
    assert decode_image(data, max_pixels=2400)[1].width == 60
    bomb = bytearray(encoded(Image.new("1", (1, 1)), "BMP"))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2
    assert reason(bytes(bomb)) == "too_large"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "TIFF", "PNG"])
def test_exif_orientation_is_applied(orientation: int, image_format: str) -> None:
    # Two columns and one row of 16 px squares, upright: red left, blue right.
    upright = Image.fromarray(
        np.repeat(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 16, 0), 16, 1)
    )
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's Transpose that stores it so
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, facts = decode_image(encoded(stored, image_format, exif=exif))
    assert facts.orientation == orientation
    assert (facts.width, facts.height) == image.size == (32, 16)
    red, blue = image.getpixel((4, 8)), image.getpixel((27, 8))
    assert red[0] > 200 > 60 > red[2]
    assert blue[2] > 200 > 60 > blue[0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_or_invalid_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert decode_image(encoded(NOISE, "JPEG", exif=exif))[1].orientation == 1
    assert decode_image(encoded(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"))[1].orientation == 1


def test_transparency_is_composited_on_white() -> None:
    hidden = np.zeros((2, 2, 4), np.uint8)
    hidden[..., 1] = 200
    hidden[0, 0, 3] = 255
    for image_format in ("PNG", "WEBP"):
        image = np.asarray(decode_image(encoded(hidden, image_format, lossless=True))[0])
        assert image[0, 0].tolist() == [0, 200, 0]
        assert image[1, 1].tolist() == [255, 255, 255]
    grey = np.stack([np.full((2, 2), 90, np.uint8), np.full((2, 2), 128, np.uint8)], -1)
    assert np.asarray(decode_image(encoded(Image.fromarray(grey, "LA")))[0])[0, 0].tolist() == [172] * 3
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    image = np.asarray(decode_image(encoded(palette, transparency=1))[0])
    assert image.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    rgb = Image.fromarray(np.full((8, 8, 3), 255, np.uint8))
    image, facts = decode_image(encoded(rgb.convert(mode), "TIFF"))
    assert facts.mode == mode
    assert np.asarray(image).min() >= 250


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = Image.fromarray(np.full((16, 16, 3), (220, 20, 20), np.uint8)).convert("CMYK")
    assert np.allclose(np.asarray(decode_image(encoded(red, "JPEG"))[0]), (220, 20, 20), atol=6)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_divided_by_256(image_format: str) -> None:
    ramp = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    image, facts = decode_image(encoded(Image.fromarray(ramp), image_format))
    assert facts.mode == "I;16"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_images_of_more_than_8_bits_are_scaled_by_their_range() -> None:
    def grey(values: list[float], dtype: type) -> list[int]:
        image = Image.fromarray(np.array([values], dtype))
        return np.asarray(decode_image(encoded(image, "TIFF"))[0])[0, :, 0].tolist()

    assert grey([0.0, 0.5, 1.0], np.float32) == [0, 128, 255]
    assert grey([0.0, 7.0, 200.0], np.float32) == [0, 7, 200]
    assert grey([-1.0, 0.0, 1.0], np.float32) == [0, 128, 255]
    assert grey([0, 256, 65535], np.int32) == [0, 1, 255]
    assert grey([0, 70_000, 140_000], np.int32) == [0, 128, 255]
    assert grey([5.0, 5.0], np.float32) == [5, 5]
    assert reason(encoded(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF")) == "corrupt"


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    image, facts = decode_image(data)
    assert facts.frames == 3
    assert np.allclose(np.asarray(image), (255, 0, 0), atol=4)


def test_file_extension_plays_no_role(tmp_path: Path) -> None:
    (tmp_path / "really_png.jpg").write_bytes(encoded(NOISE, "PNG"))
    source = open_source(str(tmp_path))
    assert np.array_equal(np.asarray(decode_image(source.read(source.records[0].path))[0]), NOISE)


# Cropping


def test_crop_equals_the_published_preprocessing() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (333, 500, 3), dtype=np.uint8))
    resized = image.resize((224 * 500 // 333, 224), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    expected = np.asarray(resized)[:, left : left + 224]
    assert np.array_equal(crop_square(image, 224), expected)
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    turned = crop_square(tall, 224).transpose(1, 0, 2).astype(int)
    # The two passes of the filter round, and clamp, in another order.
    assert np.abs(turned - expected).mean() < 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 9999), (9999, 1), (3, 5000), (224, 224), (223, 225), (2, 3)])
def test_every_size_gives_a_square(size: tuple[int, int]) -> None:
    square = crop_square(Image.new("RGB", size, (10, 20, 30)), 224)
    assert (square.shape, square.dtype) == ((224, 224, 3), np.uint8)
    assert np.array_equal(square[0, 0], (10, 20, 30))
    assert square.std(axis=(0, 1)).max() == 0


def test_crop_of_a_long_strip_is_its_middle() -> None:
    strip = np.zeros((4, 400, 3), np.uint8)
    strip[:, 198:202] = 255
    square = crop_square(Image.fromarray(strip), 64)
    assert square[32, 32].min() == 255
    assert square.mean() > 240


def test_real_photographs_decode(shared: Path) -> None:
    source = open_source(str(shared / "data/imagenet-one-per-class"))
    assert len(source.records) == len(source.class_map) == 1000
    modes = {decode_image(source.read(r.path))[1].mode for r in source.records[::50]}
    assert modes <= {"RGB", "L", "CMYK"}


# What a stranger's file may ask for


def test_postscript_is_no_picture_whatever_its_name_is() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS", "Pillow itself would take it"
    assert reason(data) == "not_an_image"


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def with_chunks(*chunks: bytes, at_end: bool = False) -> bytes:
    data = encoded(NOISE)
    place = len(data) - 12 if at_end else 33  # before IEND, or after IHDR
    return data[:place] + b"".join(chunks) + data[place:]


LARGE = b"x" * (2**20 + 9)
METADATA = {
    "text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LARGE)),
    "profile": chunk(b"iCCP", b"ICC\0\0" + zlib.compress(LARGE)),
    "checksum": chunk(b"gAMA", struct.pack(">I", 45455), crc=7),
    "broken profile": chunk(b"iCCP", b"ICC\0\0nonsense"),
}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", METADATA)
def test_pixels_of_a_png_do_not_depend_on_its_metadata(kind: str, at_end: bool) -> None:
    image, facts = decode_image(with_chunks(METADATA[kind], at_end=at_end))
    np.testing.assert_array_equal(np.asarray(image), NOISE)
    assert facts.width == 60


def test_orientation_survives_damaged_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(NOISE, exif=exif)
    image, facts = decode_image(data[:33] + METADATA["checksum"] + METADATA["text"] + data[33:])
    np.testing.assert_array_equal(np.asarray(image), NOISE[::-1, ::-1])
    assert facts.orientation == 3


def test_damaged_transparency_is_still_refused() -> None:
    transparent = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3), crc=7)
    assert reason(with_chunks(transparent)) in ("corrupt", "not_an_image")


def test_strips_of_a_large_picture_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Image.fromarray(np.dstack([NOISE, NOISE[..., :1]]))
    pictures = [
        encoded(clear),
        encoded(clear.convert("P"), transparency=3),
        encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)),
        encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
    ]
    whole = [np.asarray(decode_image(data)[0]) for data in pictures]
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 120)
    for data, expected in zip(pictures, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(decode_image(data)[0]), expected)


def test_large_pictures_are_decoded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 2400)
    small, large = encoded(NOISE[:20]), encoded(NOISE)
    done = threading.Event()

    def decode_second() -> None:
        decode_image(large)
        done.set()

    with contextlib.ExitStack() as turn:
        decode_image(large, turn=turn)
        second = threading.Thread(target=decode_second)
        second.start()
        decode_image(small)
        assert not done.is_set()
    second.join(30)
    assert done.is_set()


@pytest.mark.parametrize(("plugin", "image_format"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")])
def test_formats_of_installed_plugins_are_decoded(plugin: str, image_format: str, tmp_path: Path) -> None:
    pytest.importorskip(plugin)
    from hierarchy_builder.files.untrusted.pictures import PLUGINS, installed_plugins, missing_plugin

    assert plugin in [each.module for each in installed_plugins()]
    (suffixes,) = (each.suffixes for each in PLUGINS if each.format == image_format)
    data = encoded(Image.new("RGB", (64, 48), "red"), image_format)
    image, _ = decode_image(data)
    assert image.size == (64, 48)
    (tmp_path / f"photo{suffixes[0]}").write_bytes(data)
    assert [record.path for record in open_source(str(tmp_path)).records] == [f"photo{suffixes[0]}"]
    assert missing_plugin(suffixes[0]) is None
