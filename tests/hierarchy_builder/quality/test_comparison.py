"""Two builds of the same images: what differs, on which level, on which image most."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import write_tree
from sklearn.metrics import adjusted_rand_score
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli.app import app
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe
from hierarchy_builder.errors import BuilderError, ConfigMismatchError, UsageError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.comparison import compare_builds, write_comparison
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))


def built(photos: Path, place: Path, order: str = "shuffled", **recipe) -> BuildFolder:
    folder = BuildFolder(place)
    steps.extract(folder, str(photos), ExtractConfig(encoder="dct", order=order), SESSION)
    steps.cluster(folder, HierarchyRecipe(**recipe), SESSION)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos"), per_class=3)


@pytest.fixture(scope="module")
def first(photos, tmp_path_factory) -> BuildFolder:
    return built(photos, tmp_path_factory.mktemp("builds") / "first")


@pytest.fixture(scope="module")
def second(photos, tmp_path_factory) -> BuildFolder:
    """Other cuts, one level fewer, and rows in another order."""
    return built(
        photos, tmp_path_factory.mktemp("builds") / "second", "listed", cuts=(0.4,), spatial_weight=0.5
    )


def test_comparison_of_a_build_with_itself_finds_no_difference(first) -> None:
    found = compare_builds(first, first)
    assert (found.adjusted_rand == 1).all()
    assert (found.variation_of_information == 0).all()
    assert len(found.most_changed()) == 0
    assert found.as_json()["most_changed"] == []


def test_images_are_matched_by_key_and_levels_from_the_coarsest(first, second) -> None:
    found = compare_builds(first, second)
    assert (len(found.keys), found.only, found.num_levels) == (9, (0, 0), (4, 3))
    assert found.rows[0].tolist() != found.rows[1].tolist()
    ours, theirs = (stores.open_store(folder.regions)["regions"][:] for folder in (first, second))
    for n, level in np.ndindex(9, 2):
        a, b = ours[found.rows[0, n], level], theirs[found.rows[1, n], level]
        assert found.adjusted_rand[n, level] == pytest.approx(adjusted_rand_score(a.ravel(), b.ravel()))
        assert found.counts[:, n, level].tolist() == [len(np.unique(a)), len(np.unique(b))]
    coarse, fine = found.by_level()
    assert (coarse["adjusted_rand"], coarse["variation_of_information"], coarse["count_changed"]) == (1, 0, 0)
    assert fine["adjusted_rand"] < 1
    assert fine["count_shift"] == pytest.approx(fine["regions_b"] - fine["regions_a"], abs=1e-5)


def test_comparison_is_symmetric(first, second) -> None:
    there, back = compare_builds(first, second).by_level(), compare_builds(second, first).by_level()
    for a, b in zip(there, back, strict=True):
        assert a["adjusted_rand"] == pytest.approx(b["adjusted_rand"])
        assert a["variation_of_information"] == pytest.approx(b["variation_of_information"])
        assert a["count_shift"] == -b["count_shift"]


def test_most_changed_come_first(first, second) -> None:
    found = compare_builds(first, second)
    changed = found.adjusted_rand.mean(axis=1)[found.most_changed()]
    assert (np.diff(changed) >= 0).all()
    assert (changed < 1).all()
    assert len(changed) == (found.adjusted_rand.mean(axis=1) < 1).sum() > 0
    assert found.as_json()["most_changed"][0]["key"] == found.keys[found.most_changed()[0]]


def test_images_of_one_build_alone_are_counted(first, photos, tmp_path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "circle" / "000.png").rename(tmp_path / "photos" / "circle" / "new.png")
    (tmp_path / "photos" / "circle" / "001.png").unlink()
    other = built(tmp_path / "photos", tmp_path / "build")
    found = compare_builds(first, other)
    assert (len(found.keys), found.only) == (7, (2, 1))
    assert (found.adjusted_rand == 1).all()


def test_builds_without_a_common_image_are_refused(first, tmp_path) -> None:
    folder = tmp_path / "photos" / "animals"
    write_tree(tmp_path / "drawn", per_class=1)
    shutil.copytree(tmp_path / "drawn" / "circle", folder)
    with pytest.raises(UsageError, match="no image in common"):
        compare_builds(first, built(tmp_path / "photos", tmp_path / "build"))


def test_builds_of_different_grids_are_refused(first, photos, tmp_path) -> None:
    other = BuildFolder(tmp_path / "build")
    steps.extract(other, str(photos), ExtractConfig(encoder="patch_means:PatchMeans"), SESSION)
    with pytest.raises(BuilderError, match="hierarchy-builder cluster"):
        compare_builds(first, other)
    steps.cluster(other, HierarchyRecipe.paper(), SESSION)
    with pytest.raises(ConfigMismatchError, match=r"has 16×16 tokens, .* has 8×8"):
        compare_builds(first, other)


def test_page_and_command(first, second, tmp_path) -> None:
    page = write_comparison(compare_builds(first, second), tmp_path / "page.html").read_text()
    assert page.count('<article class="card') == len(compare_builds(first, second).most_changed())
    assert "Most changed" in page
    assert all(
        text in page for text in ("number of regions in first", "regions more in second", "spatial_weight")
    )
    runner = CliRunner()
    arguments = ["compare", str(first.root), str(second.root)]
    result = runner.invoke(app, [*arguments, "--out", str(tmp_path / "compare.html")])
    assert result.exit_code == 0, result.output
    assert "variation of information" in result.stdout
    assert (tmp_path / "compare.html").read_text() == page
    printed = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert printed == compare_builds(first, second).as_json()
    same = runner.invoke(
        app, ["compare", str(first.root), str(first.root), "--out", str(tmp_path / "same.html")]
    )
    assert same.exit_code == 0, same.output
    assert "Most changed" not in (tmp_path / "same.html").read_text()
