"""`--image-px`: the stored crop shows what the encoder saw, at its own size and from the photograph itself."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.plan import make_plan
from hierarchy_builder.build.space import later_bytes
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli import app as cli
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import ConfigMismatchError, UsageError
from hierarchy_builder.fields import from_mapping, identity
from hierarchy_builder.files.whole import read_json
from hierarchy_builder.images.decoding import crop_square
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.verify.checks import find_problems
from hierarchy_builder.verify.repair import repair
from pipelines.build import app as pipelines_app
from trainer.data.pictures import PictureDataset
from trainer.data.shards import open_index
from trainer.data.stream import StreamPlan

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True), trust_encoder=True)
PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="patch_means:PatchMeans", block_rows=8, max_bad_fraction=0.5),
    hierarchy=HierarchyRecipe.paper(),
    shard=ShardConfig(samples_per_shard=5, images=True, image_px=192),
)
ROTATED = 6
"""EXIF orientation of a photo held on its side."""


def blocks(width: int, height: int, seed: int = 0, cells: int = 6) -> Image.Image:
    """Coloured blocks of odd sizes: nothing in it looks like its neighbour."""
    colours = np.random.default_rng([width, height, seed]).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    rows, columns = (np.arange(number) * cells // number for number in (height, width))
    return Image.fromarray(colours[rows][:, columns])


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), np.int64)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 260),
    height=st.integers(1, 260),
    size_px=st.sampled_from([7, 14, 64]),
    out_px=st.sampled_from([5, 32, 96]),
)
def test_the_region_is_the_encoders_and_the_pixels_are_pillows(
    width: int, height: int, size_px: int, out_px: int
) -> None:
    if max(width, height) > 4 * min(width, height):
        width = height  # the ends of a strip are cut off first
    photo = blocks(width, height)
    short = min(width, height)
    size = (size_px * width // short, size_px * height // short)
    corner = [round((side - size_px) / 2) for side in size]
    step = (width / size[0], height / size[1])
    box = (
        *(corner[axis] * step[axis] for axis in (0, 1)),
        *(min((corner[axis] + size_px) * step[axis], photo.size[axis]) for axis in (0, 1)),
    )
    expected = np.asarray(photo.resize((out_px, out_px), Image.Resampling.BICUBIC, box=box), np.int64)
    found = crop_square(photo, size_px, out_px=out_px)
    assert np.abs(found - expected).max() <= 2  # Pillow keeps a box in float32, and rounds in both passes
    assert np.array_equal(crop_square(photo, size_px, out_px=size_px), crop_square(photo, size_px))


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (97, 96), (400, 60)])
def test_the_picture_shrunk_to_the_encoders_size_is_its_crop(size: tuple[int, int]) -> None:
    photo, side = blocks(*size), 14
    seen = crop_square(photo, side).astype(np.int64)
    errors = np.abs(shrunk(crop_square(photo, side, out_px=8 * side), side) - seen)
    assert errors.mean() < 4
    if size == (
        500,
        333,
    ):  # rounding to 14 px moves its crop by half a pixel, which a crop of another size misses
        assert np.abs(shrunk(crop_square(photo, 8 * side), side) - seen).mean() > 10


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photos of three shapes, one of them held on its side, and one that is none."""
    root = tmp_path_factory.mktemp("photos")
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    for number in range(12):
        path = root / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        shape = ((330, 251), (200, 307), (90, 90))[number % 3]
        blocks(*shape, seed=number).save(path, **({"exif": exif} if number == 3 else {}))
    (root / "class0" / "bad.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildFolder:
    folder = BuildFolder(tmp_path_factory.mktemp("built") / "build")
    steps.build(folder, str(photos), PLAN, SESSION)
    return folder


def pictures(folder: BuildFolder) -> dict[str, np.ndarray]:
    """Stored pictures by key."""
    samples = (sample for tar in sorted(folder.shards.glob("*.tar")) for sample in read_shard(tar))
    return {sample.key: np.asarray(Image.open(io.BytesIO(sample.image or b""))) for sample in samples}


def content(folder: BuildFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.shards.iterdir())}


def test_a_build_stores_that_size_and_keeps_its_tokens(
    built: BuildFolder, photos: Path, tmp_path: Path
) -> None:
    plain = BuildFolder(tmp_path / "plain")
    plan = replace(PLAN, shard=replace(PLAN.shard, image_px=None, image_quality=100))
    steps.build(plain, str(photos), plan, SESSION)
    found, seen = pictures(built), pictures(plain)
    assert found.keys() == seen.keys()
    assert {picture.shape for picture in found.values()} == {(192, 192, 3)}
    assert {picture.shape for picture in seen.values()} == {(128, 128, 3)}
    for key, picture in found.items():
        assert np.abs(shrunk(picture, 128) - seen[key]).mean() < 3
    assert list(find_problems(built)) == []
    assert read_json(built.shards / "index.json")["image_px"] == 192
    assert "192 px a side" in (built.shards / "README.md").read_text()
    assert "image_px" not in read_json(plain.shards / "index.json")


def test_one_pass_stores_the_same_bytes(built: BuildFolder, photos: Path, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    steps.build(folder, str(photos), PLAN, SESSION, fused=True)
    assert content(folder) == content(built)
    (folder.shards / "train-000001.tar").unlink()
    repair(folder, SESSION)
    assert content(folder) == content(built)


def test_repair_stores_the_same_bytes(built: BuildFolder, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(built.root.parent, tmp_path / "copy")
    folder = BuildFolder(tmp_path / "copy" / "build")
    steps.extract(folder, str(photos), PLAN.extract, SESSION)  # where the photos lie from there
    before = content(folder)
    tar = bytearray((folder.shards / "train-000001.tar").read_bytes())
    tar[len(tar) // 2] ^= 1
    (folder.shards / "train-000001.tar").write_bytes(tar)
    (folder.shards / "index.json").unlink()
    repair(folder, SESSION)
    assert content(folder) == before


def test_another_size_asks_for_a_fresh_start(built: BuildFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigMismatchError, match=r"config\.image_px: 192 there, 64 now(.|\n)*--fresh"):
        steps.shard(built, replace(PLAN.shard, image_px=64), SESSION)
    with pytest.raises(ConfigMismatchError, match=r"config\.image_px: 192 there, None now"):
        steps.shard(built, replace(PLAN.shard, image_px=None), SESSION)


def test_default_picture_size_keeps_the_identity_of_earlier_builds() -> None:
    """Hashes of builds from before there was a size stay."""
    assert "image_px" not in identity(ShardConfig(images=True))
    assert identity(ShardConfig(images=True, image_px=256))["image_px"] == 256
    assert identity(ShardConfig(**identity(ShardConfig(images=True)))) == identity(ShardConfig(images=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_px": 256}, r"image_px is 256.*none are stored: expected it with images \(--images\)"),
        ({"images": True, "image_px": 0}, "image_px is 0, expected 1 to 8192"),
        ({"images": True, "image_px": -4}, "image_px is -4, expected 1 to 8192"),
        ({"images": True, "image_px": 8193}, "image_px is 8193, expected 1 to 8192"),
        ({"images": True, "image_px": 2.5}, "image_px"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_mapping(ShardConfig, fields, "shard")
    assert caught.value.exit_code == 2


def test_the_flag_reaches_every_verb(photos: Path, tmp_path: Path) -> None:
    def command(*words: str) -> Any:
        return CliRunner().invoke(cli.app, [*words, "--workers", "0", "-q", "--json"])

    out = str(tmp_path / "build")
    words = [str(photos), "--out", out, "--encoder", "patch_means:PatchMeans", "--max-bad-fraction", "0.5"]
    assert isinstance(command("build", *words, "--image-px", "64").exception, UsageError)
    job = CliRunner().invoke(pipelines_app, [*words[:3], "--image-px", "64"])
    assert isinstance(job.exception, UsageError)
    assert not (tmp_path / "build").exists()
    foretold = command("plan", *words, "--images", "--image-px", "64")
    assert foretold.exit_code == 0
    assert command("build", *words, "--images", "--image-px", "64").exit_code == 0
    assert {picture.shape for picture in pictures(BuildFolder(Path(out))).values()} == {(64, 64, 3)}
    assert isinstance(command("shard", out, "--image-px", "80").exception, ConfigMismatchError)
    assert command("shard", out, "--images", "--image-px", "80", "--fresh", "--yes").exit_code == 0
    assert {picture.shape for picture in pictures(BuildFolder(Path(out))).values()} == {(80, 80, 3)}
    assert isinstance(
        command("shard", out, "--no-images").exception, ConfigMismatchError
    )  # of images, not of px
    assert command("shard", out, "--no-images", "--fresh", "--yes").exit_code == 0


def test_plan_and_room_count_the_size(built: BuildFolder, photos: Path, tmp_path: Path) -> None:
    folder = BuildFolder(tmp_path / "build")
    plan = make_plan(folder, str(photos), PLAN, SESSION)
    real = sum(path.stat().st_size for path in built.shards.iterdir())
    assert abs(plan.sizes["shards"] / real - 1) < 0.01
    encoder = json.loads(built.manifest.read_text())["stages"]["extract"]["inputs"]["encoder"]
    small, large = (
        later_bytes(replace(PLAN, shard=replace(PLAN.shard, image_px=px)), 1, encoder)["shards"]
        for px in (None, 1024)
    )
    assert large - small > 0.5 * (1024**2 - 128**2)


def test_the_trainer_reads_any_size(built: BuildFolder) -> None:
    index = open_index(str(built.root))
    plan = StreamPlan(shard_sizes=(index.num_samples,), num_levels=index.num_levels, batch_size=3)
    batch = PictureDataset(index, plan, (64, 64)).samples([0, 1, 2])
    assert batch.pictures.shape == (3, 3, 64, 64)
