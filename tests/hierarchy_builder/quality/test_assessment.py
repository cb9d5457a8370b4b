"""Quality of a real build: views of photos, what is left out and why, quality.json, page and command."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from patch_means import PatchMeans
from pictures import draw_picture, write_tree
from PIL import Image
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli.app import app
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.files.whole import read_json, write_sealed_json
from hierarchy_builder.hierarchy.recipe import build_hierarchy, check_nesting
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.assessment import Views, assess_build, encode_views, seed_scores, view_scores
from hierarchy_builder.quality.scores import by_level
from hierarchy_builder.quality.scores_page import score_tables, summary, write_quality
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder

RECIPE = HierarchyRecipe(cuts=(0.5,))
SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos") / "photos", per_class=3)


@pytest.fixture(scope="module")
def built(photos, tmp_path_factory) -> BuildFolder:
    folder = BuildFolder(tmp_path_factory.mktemp("assessed") / "build")
    steps.extract(folder, str(photos), ExtractConfig(encoder="dct"), SESSION)
    steps.cluster(folder, RECIPE, SESSION)
    return folder


@pytest.fixture
def copied(photos, built, tmp_path) -> BuildFolder:
    """The build and its photos at a place of their own."""
    shutil.copytree(photos, tmp_path / "photos" / "photos")
    shutil.copytree(built.root, tmp_path / "assessed" / "build")
    folder = BuildFolder(tmp_path / "assessed" / "build")
    manifest = read_json(folder.manifest)
    manifest["stages"]["extract"]["source"] = "../../photos/photos"
    write_sealed_json(folder.manifest, manifest)
    return folder


@pytest.fixture
def masks(tmp_path) -> Path:
    """Two people's maps of one circle, one of another photo that has the wrong size; folders as of the photos."""
    folder = tmp_path / "masks" / "circle"
    folder.mkdir(parents=True)
    thirds = np.repeat(np.arange(1, 4), 32)[None].repeat(80, axis=0).astype(np.uint8)
    Image.fromarray(thirds).save(folder / "000_0.png")
    Image.fromarray(thirds.clip(max=2)).save(folder / "000_1.png")
    Image.fromarray(thirds[:, :50]).save(folder / "001.png")
    return tmp_path / "masks"


def test_views_are_the_photo_moved_and_mirrored() -> None:
    pictures = [draw_picture("circle", seed, (200, 150)) for seed in range(3)]
    views = encode_views(PatchMeans(), pictures)
    np.testing.assert_allclose(views.mirrored, views.plain[:, :, ::-1], atol=1e-6)
    np.testing.assert_array_equal(views.upper_left[:, 1:, 1:], views.lower_right[:, :-1, :-1])
    assert not np.array_equal(views.upper_left, views.lower_right)


def test_view_scores_compare_the_same_places() -> None:
    """A scene of two materials that is divided alike however it is seen."""
    random = np.random.default_rng(0)
    scene = np.zeros((4, 9, 9, 4), np.float32)
    inside = np.hypot(*(np.indices((9, 9)) - 4)) < 3
    scene[:, inside, 0], scene[:, ~inside, 1] = 1, 1
    scene += 0.02 * random.normal(size=scene.shape).astype(np.float32)
    views = Views(
        plain=scene[:, :8, :8],
        mirrored=scene[:, :8, :8][:, :, ::-1],
        upper_left=scene[:, :8, :8],
        lower_right=scene[:, 1:, 1:],
    )
    recipe = HierarchyRecipe(cuts=())
    regions = build_hierarchy(views.plain.astype(np.float16), recipe).regions
    assert {name: values.tolist() for name, values in view_scores(views, regions, recipe).items()} == {
        name: [[1.0]] * 4 for name in ("flip", "shift", "float16", "bfloat16")
    }


def test_seed_scores_are_the_mean_over_other_seeds() -> None:
    features = np.random.default_rng(1).normal(size=(6, 8, 8, 4)).astype(np.float16)
    regions = build_hierarchy(features, RECIPE).regions
    one, two = (seed_scores(features, regions, RECIPE, num_seeds=n) for n in (1, 2))
    next_seed = HierarchyRecipe(cuts=RECIPE.cuts, seed=1)
    other = seed_scores(features, regions, next_seed)  # against seed 2
    np.testing.assert_allclose(two, (one + other) / 2)
    assert (one < 1).any()


def test_assessment_of_a_build(built) -> None:
    found = assess_build(built)
    scores = found.scores
    assert all(values.shape == (9, 2) and np.isfinite(values).all() for values in scores.values())
    assert not found.violations.any()
    assert (scores["regions"][:, 0] == 2).all()
    assert (scores["float16"] > 0.9).all()
    assert (scores["flip"] < 1).any()
    assert set(scores) == {
        "regions", "smallest", "median", "largest", "within", "between", "connected",
        "seed", "flip", "shift", "float16", "bfloat16",
    }  # fmt: skip
    assert found.facts["photos"] == {"read": 9, "unreadable": {}, "why_not": ""}
    assert (found.facts["num_images"], found.facts["num_sampled"], found.facts["masks"]) == (9, 9, None)
    assert by_level(found.scores) == by_level(assess_build(built).scores)


def test_limit_and_keys_choose_the_images(built) -> None:
    limited = assess_build(built, limit=3)
    assert sorted(key.split("/")[0] for key in limited.keys) == ["circle", "square", "stripes"]
    chosen = assess_build(built, keys=["square/002", "circle/001"])
    assert sorted(chosen.keys) == ["circle/001", "square/002"]
    everything = assess_build(built)
    for n, key in enumerate(chosen.keys):
        whole = everything.of_image(everything.keys.index(key))
        for score in ("within", "flip", "seed"):
            assert chosen.of_image(n)[score] == pytest.approx(whole[score])
    with pytest.raises(UsageError, match="no usable image no/such"):
        assess_build(built, keys=["no/such"])


def test_human_scores_exist_only_for_images_with_label_maps(built, masks) -> None:
    found = assess_build(built, masks=masks)
    drawn = np.isfinite(found.scores["covering"][:, 0])
    assert [key for key, has in zip(found.keys, drawn, strict=True) if has] == ["circle/000"]
    assert found.facts["masks"] == {
        "images": 1,
        "maps": 2,
        "refused": ["wrong_size: 001.png has 50×80 pixels, expected 96×80 as its photo"],
    }
    assert "Agreement with people" in score_tables(found)
    assert by_level(found.baselines["grid"])[0]["covering"] > 0


def test_missing_photo_is_counted_and_left_out(copied) -> None:
    (copied.root.parent.parent / "photos" / "photos" / "circle" / "001.png").unlink()
    found = assess_build(copied)
    gone = found.keys.index("circle/001")
    assert found.facts["photos"] == {"read": 8, "unreadable": {"missing": 1}, "why_not": ""}
    assert np.isnan(found.scores["flip"]).all(axis=1).nonzero()[0].tolist() == [gone]
    assert np.isfinite(found.scores["within"]).all()
    assert summary(found)["photos not readable"] == {"missing": 1}


def test_assessment_without_encoder_scores_the_regions(copied) -> None:
    manifest = read_json(copied.manifest)
    manifest["stages"]["extract"]["request"]["encoder"] = "onnx:gone.onnx"
    write_sealed_json(copied.manifest, manifest)
    found = assess_build(copied)
    assert "gone.onnx" in summary(found)["photos not encoded again"]
    assert np.isnan(found.scores["shift"]).all()
    assert [row["score"] for row in score_tables(found)["Stability"]] == ["other seeds"]


def test_encoder_with_other_weights_is_not_used(copied, monkeypatch) -> None:
    def other(*words, **options):
        encoder = load_encoder(*words, **options)
        encoder.weights_hash = "other"
        return encoder

    monkeypatch.setattr("hierarchy_builder.quality.assessment.load_encoder", other)
    assert "other weights" in assess_build(copied).facts["photos"]["why_not"]


def test_regions_changed_after_clustering_are_refused(copied) -> None:
    group = stores.open_store(copied.regions, "r+")
    regions = np.asarray(stores.array_of(group, "regions")[:])
    regions[0, 1, 0, 0] = 9
    stores.array_of(group, "regions")[:] = regions
    with pytest.raises(
        BuilderError, match=r"regions\.zarr/regions/c/0/0/0/0 is missing or not the file that cluster"
    ):
        assess_build(copied)


def test_assessment_of_an_unclustered_build_is_refused(photos, tmp_path) -> None:
    folder = BuildFolder(tmp_path / "build")
    steps.extract(folder, str(photos), ExtractConfig(encoder="dct"), SESSION)
    with pytest.raises(BuilderError, match="hierarchy-builder cluster"):
        assess_build(folder)


def test_page_shows_tables_plots_and_the_least_stable(built, masks, tmp_path) -> None:
    found = assess_build(built, masks=masks)
    page = write_quality(built, found, tmp_path / "page.html").read_text()
    for text in (
        "Stability",
        "Agreement with people",
        "Least stable",
        "Furthest from people",
        "covering",
        "wrong_size",
    ):
        assert text in page
    assert page.count("<svg") == 6
    stored = read_json(built.quality)
    assert stored["levels"][0]["regions"] == 2
    assert [image["key"] for image in stored["per_image"]] == found.keys
    assert stored == json.loads(json.dumps(found.as_json()))


def test_command(built, masks, tmp_path) -> None:
    runner = CliRunner()
    arguments = [
        "report",
        str(built.root),
        "--quality",
        "--samples",
        "4",
        "--quiet",
        "--out",
        str(tmp_path / "page.html"),
    ]
    result = runner.invoke(app, [*arguments, "--masks", str(masks)])
    assert result.exit_code == 0, result.output
    assert "boundary F" in result.stdout
    assert str(tmp_path / "page.html") in result.stdout
    printed = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert printed["num_sampled"] == 4
    assert printed["cluster"] == read_json(built.manifest)["stages"]["cluster"]["hash"]
    alone = runner.invoke(app, ["report", str(built.root), "--masks", str(masks)])
    assert isinstance(alone.exception, UsageError)
    assert "belongs to --quality" in str(alone.exception)


@pytest.fixture
def benchmark(monkeypatch):
    """The script benchmarks/builder/recipes.py."""
    return importlib.import_module("benchmarks.builder.recipes")


def test_benchmark_of_recipes_runs(photos, masks, benchmark, monkeypatch, capsys) -> None:
    arguments = [str(photos), "--masks", str(masks), "--recipes", "paper", "--slice", ":3"]
    monkeypatch.setattr(sys, "argv", ["recipes.py", *arguments])
    benchmark.main()
    done = capsys.readouterr()
    *table, last = done.out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2::3]] == [
        "paper",
        "grid as paper",
        "random as paper",
    ]
    scores = json.loads(last)
    assert scores["grid as paper"][2]["regions"] == scores["paper"][2]["regions"]
    assert "left out: wrong_size: 001.png" in done.err


def test_benchmark_of_recipes_cuts_to_equal_counts(benchmark) -> None:
    features = np.random.default_rng(0).normal(size=(4, 8, 8, 16)).astype(np.float32)
    names = [field.name for field in dataclasses.fields(Views)]
    views = Views(**dict.fromkeys(names, features))
    counts = np.array([[2, 3, 9], [2, 2, 5], [2, 7, 12], [2, 4, 4]])
    regions = benchmark.with_as_many(views, HierarchyRecipe.paper(), counts)
    np.testing.assert_array_equal(regions.max(axis=(2, 3)) + 1, counts)
    assert not check_nesting(regions).any()


def test_objects_come_from_the_size_of_the_segmentation_model(tmp_path, monkeypatch) -> None:
    """A model of 48 pixels (3×3 tokens) calls bright red object; the cells asked for are not a multiple of its grid."""
    predicted_objects = importlib.import_module("benchmarks.builder.recipes").predicted_objects
    kernel = np.zeros((2, 3, 16, 16), np.float32)
    kernel[1, 0, 0, 0] = 1
    weights = onnx.numpy_helper.from_array(kernel, "weights")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("image", ["N", 3, 48, 48]), ("logits", ["N", 2, 3, 3]))
    ]
    node = onnx.helper.make_node("Conv", ["image", "weights"], ["logits"], strides=[16, 16])
    graph = onnx.helper.make_graph([node], "red", ends[:1], ends[1:], [weights])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "red.onnx")
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[:, :32, 0] = 255
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "left.png")
    (found,) = predicted_objects(f"onnx:{tmp_path / 'red.onnx'}:logits", str(tmp_path / "photos"), (56, 56))
    expected = np.zeros((1, 56, 56), np.int64)
    expected[:, :, :19] = 1  # centres of the first 19 cells lie in the left third
    np.testing.assert_array_equal(found, expected)
