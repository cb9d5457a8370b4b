"""The page as data and as HTML: exact pictures, escaped text, nothing from outside, plots that hide nothing."""

import base64
import hashlib
import html
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hierarchy_builder.canvases.gallery import (
    Code,
    Facts,
    Gallery,
    LevelViewer,
    Page,
    Plots,
    Section,
    Table,
    View,
    data_uri,
    render,
    write_page,
)
from hierarchy_builder.canvases.plots import Plot, Series, draw, short_number
from hierarchy_builder.canvases.views import (
    HierarchyView,
    hierarchy_viewers,
    level_names,
    region_captions,
    shared_palette,
)
from hierarchy_builder.quality.report import hierarchy_page
from hierarchy_builder.terminal import show_value
from trainer.evaluation.pages import curves_section, training_page, training_plots
from trainer.trajectories.view import (
    CELL_PX,
    GAP_PX,
    HEADER_PX,
    LABEL_PX,
    MARGIN_PX,
    PAPER,
    TrajectoryView,
    page_palette,
    trajectory_grid_png,
)


def blobs(seed: int = 0, side: int = 16, channels: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Smooth features [H, W, C] and three nested levels [3, H, W] made by halving a disc."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / (side - 1) - 0.5
    inside = np.hypot(x, y) < 0.4
    parts = np.where(inside, 1 + (x > 0), 0)
    subparts = np.where(inside, 1 + (x > 0) + 2 * (y > 0), 0)
    waves = np.stack([x, y, x * y, inside], axis=-1) @ generator.normal(size=(4, channels))
    regions = np.stack([inside, parts, subparts]).astype(np.uint8)
    return (waves + 0.02 * generator.normal(size=waves.shape)).astype(np.float16), regions


def sample(seed: int = 0, photo: bool = True, decoded: bool = True, **changes: Any) -> HierarchyView:
    features, regions = blobs(seed)
    shades = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 4, 3), dtype=np.uint8)
    pictures = shades.repeat(28, axis=1).repeat(28, axis=2)
    fields: dict[str, Any] = {
        "key": f"class/{seed}",
        "class_name": "tench",
        "regions": regions,
        "features": features,
        "photo": pictures[0].copy() if photo else None,
        "decoded": pictures if decoded else None,
        "notes": {"separation": 0.5},
    }
    return HierarchyView(**{**fields, **changes})


def trajectory(seed: int = 0, decoded: bool = True) -> TrajectoryView:
    view = sample(seed)
    return TrajectoryView(
        label_name="goldfish",
        seed=seed,
        canvases=view.levels(),
        decoded=view.decoded if decoded else None,
    )


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.mark.parametrize("num_colours", [2, 40, 250])
def test_token_grids_are_embedded_exactly(num_colours: int) -> None:
    generator = np.random.default_rng(num_colours)
    table = generator.integers(0, 256, size=(num_colours, 3), dtype=np.uint8)
    picture = table[generator.integers(0, num_colours, size=(16, 16))]
    uri = data_uri(picture)
    assert uri.startswith("data:image/png;base64,")
    assert np.array_equal(decode(uri), picture)


def test_photos_are_embedded_as_webp_at_their_own_resolution() -> None:
    y, x = np.mgrid[:224, :200]
    photo = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    uri = data_uri(photo)
    assert uri.startswith("data:image/webp;base64,")
    # Quality 82 on a smooth ramp: a few grey values of error; more means channels or sides are swapped.
    assert np.abs(decode(uri).astype(int) - photo).mean() < 3


def test_page_is_self_contained_and_its_policy_admits_only_its_own_script() -> None:
    page = render(hierarchy_page([sample()], {"images": 1}, [{"stage": "extract"}], {"seed": 0}))
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    assert not re.search(r"@import|url\((?![\"']?data:)", page)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    )


def test_text_from_data_is_escaped() -> None:
    attack = "<script>alert('x')</script>\"&"
    view = sample(class_name=attack, key=attack, notes={attack: attack})
    log = [{"images": 1, attack: 1.0}, {"images": 2, attack: 2.0}]
    page = training_page(
        title=attack,
        intro=attack,
        facts={attack: attack},
        teachers=[view],
        measured=[
            Section(title=attack, text=attack, blocks=[Table(rows=[{attack: attack}])]),
            *curves_section(log),
        ],
        config={"name": attack},
    )
    text = render(page)
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert html.escape("<script>alert") in text


def test_every_picture_has_a_text_and_every_level_a_caption() -> None:
    text = render(hierarchy_page([sample()], {"images": 1}))
    alternatives = re.findall(r'<img [^>]*alt="([^"]*)"', text)
    assert len(alternatives) == text.count("<img ") == 1 + 3 * 4
    assert "tench: regions, object/background" in alternatives
    assert "tench: photo" in alternatives
    for caption in ("1 region", "2 regions", "4 regions", "16 × 16"):
        assert f"<span>{caption}</span>" in text


def test_empty_parts_of_a_page_are_omitted() -> None:
    assert [section.title for section in hierarchy_page([], {"images": 0}).sections] == ["Summary"]
    page = training_page(title="run", facts={"images": 1}, trajectories=[trajectory(decoded=False)])
    assert [section.title for section in page.sections] == ["Summary", "Generated trajectories"]
    card = page.sections[1].blocks[0].viewers[0]
    assert card.reveal is None
    assert [view.name for view in card.views] == ["latent (PCA)"]
    assert "has-reveal" not in render(page).partition("<body>")[2].partition("<script>")[0]


def test_revealed_final_picture_is_embedded_once() -> None:
    page = training_page(title="run", facts={"images": 1}, trajectories=[trajectory()])
    assert render(page).count(data_uri(trajectory().decoded[-1])) == 1


def test_teachers_and_samples_share_one_palette() -> None:
    teacher, generated = sample(1), trajectory(1)
    page = training_page(title="run", facts={}, trajectories=[generated], teachers=[teacher])
    blocks = {section.title: section.blocks[0] for section in page.sections}
    of_sample = blocks["Generated trajectories"].viewers[0].views[0].layers
    of_teacher = blocks["Teacher hierarchies"].viewers[0].views[1].layers
    assert np.array_equal(of_sample, of_teacher)


def test_latent_colours_come_from_the_level_canvases() -> None:
    view = sample()
    palette = shared_palette([view.tokens()])
    coarse = hierarchy_viewers([view], palette)[0].views[1].layers[0]
    background = view.features.astype(np.float32)[view.regions[0] == 0].mean(axis=0)
    expected = palette.apply(background).astype(int)
    # Means in another order of summation may round to the neighbouring step.
    assert np.abs(coarse[view.regions[0] == 0].astype(int) - expected).max() <= 1


def test_canvases_of_a_diverged_model_are_black_and_the_page_still_opens() -> None:
    view = TrajectoryView(label_name="goldfish", seed=0, canvases=np.full((4, 4, 4, 5), np.nan))
    page = training_page(title="run", facts={}, trajectories=[view])
    assert not page.sections[0].blocks[0].viewers[0].views[0].layers.any()
    assert render(page).startswith("<!doctype html>")


def test_level_names_follow_the_method() -> None:
    assert level_names(4) == ("object/background", "parts", "subparts", "tokens")
    assert level_names(2) == ("object/background", "tokens")
    assert level_names(3) == ("object/background", "parts", "tokens")
    assert level_names(5) == ("object/background", "parts 1", "parts 2", "parts 3", "tokens")


def test_captions_count_a_divided_background_apart() -> None:
    regions = np.zeros((3, 2, 4), dtype=np.uint8)
    regions[:, :, 2:] = 1
    regions[1, 0, 0] = 2  # a second region of the background
    regions[2] = [[0, 4, 1, 2], [5, 5, 1, 3]]
    assert region_captions(regions) == (
        "1 region",
        "1 region, background 2",
        "3 regions, background 3",
        "2 × 4",
    )


def test_views_of_another_number_of_levels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"card 'tench': views and captions have \[3, 4\] levels, expected 4"
    ):
        LevelViewer(
            title="tench",
            level_names=level_names(4),
            views=[View(name="regions", layers=np.zeros((3, 2, 2, 3), dtype=np.uint8))],
        )


def test_hundreds_of_hierarchies_stay_a_few_megabytes() -> None:
    page = hierarchy_page([sample(seed, photo=False, decoded=False) for seed in range(40)], {"images": 40})
    # 40 cards of 8 token grids; 300 such cards are then below 4 MB.
    assert len(render(page)) < 40 * 13_000


def test_write_page_leaves_one_complete_file(tmp_path: Path) -> None:
    page = Page(title="seite", sections=[Section(title="Größe", blocks=[Facts(entries={"≤": None})])])
    write_page(page, tmp_path / "page.html")
    assert os.listdir(tmp_path) == ["page.html"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render(page)


def test_blocks_of_every_kind_are_drawn() -> None:
    line = Plot(title="loss", x_label="step", series=[Series(name="u", x=[0, 1], y=[1, 2])])
    blocks = [
        Facts(entries={"levels": 4}),
        Table(rows=[{"stage": "extract", "units": 3}, {"stage": "shard", "seconds": 0.25}]),
        Plots(plots=[line]),
        Code(summary="Resolved configuration", text=yaml.safe_dump({"cuts": [0.65, 0.35]})),
        Gallery(viewers=hierarchy_viewers([sample()], shared_palette([sample().tokens()]))),
    ]
    text = render(Page(title="all", sections=[Section(title="one", blocks=blocks)]))
    body = text.partition("<main>")[2]
    for found in (
        "<dd>4</dd>",
        'class="number">3</td>',
        '<th scope="col" class="number">seconds',
        "<svg ",
        "- 0.65",
        "all-levels",
    ):
        assert found in body
    assert body.count('<td class="number">–</td>') == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1281167, "1,281,167"),
        (np.int64(1000), "1,000"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (float("nan"), "nan"),
        (True, "yes"),
        (None, "–"),
        ((0.65, 0.35), "0.65, 0.35"),
        ({"a": 1}, "a 1"),
        ("dct", "dct"),
    ],
)
def test_values_are_formatted_for_readers(value: Any, shown: str) -> None:
    assert show_value(value) == shown


def test_numbers_on_axes_are_short() -> None:
    assert [short_number(v) for v in (1_500_000, 20_000, 0.05, 0, 2.5e9)] == [
        "1.5M",
        "20k",
        "0.05",
        "0",
        "2.5G",
    ]


def test_long_curves_keep_their_spikes_as_a_band() -> None:
    y = np.ones(100_000)
    y[54_321] = 100.0
    svg = draw(Plot(title="loss", x_label="step", series=[Series(name="loss", x=np.arange(len(y)), y=y)]))
    assert len(svg) < 20_000
    band = re.search(r'class="band s0" d="M([^"]*)Z"', svg)[1]
    heights = [float(point.split(",")[1]) for point in band.split("L")]
    # The spike reaches the top of the axes (4 % margin), though its run has a mean near 1.
    assert min(heights) < 20 < 170 < max(heights)


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    y = [float("nan"), 0.0, -1.0, 1e-3, 1e3, float("inf")]
    svg = draw(Plot(title="norm", x_label="step", log_y=True, series=[Series(name="norm", x=range(6), y=y)]))
    assert re.search(r'class="line s0" d="M[\d.,]+L[\d.,]+"', svg)
    assert "nan" not in svg
    assert "inf" not in svg
    empty = Plot(title="norm", x_label="step", series=[Series(name="norm", x=[0], y=[float("nan")])])
    assert "No finite points" in draw(empty)


@pytest.mark.parametrize("last", [1, 3, 9, 31, 9000])
def test_ticks_of_whole_numbers_are_whole(last: int) -> None:
    def ticks(x: list[float]) -> list[str]:
        svg = draw(
            Plot(title="inertia", x_label="iteration", series=[Series(name="a", x=x, y=[1.0] * len(x))])
        )
        return re.findall(r'class="tick middle"[^>]*>([^<]*)<', svg)

    whole = ticks([0, 1, last])
    assert len(whole) >= 2
    assert not any("." in text for text in whole if not text.endswith("k"))
    assert any("." in text for text in ticks([0, 0.5, 1]))


def test_ticks_differ_for_a_loss_that_changes_in_its_fifth_digit() -> None:
    series = Series(name="loss", x=[0, 1, 2], y=[0.99991, 0.99995, 0.99999])
    svg = draw(Plot(title="loss", x_label="step", series=[series]))
    labels = re.findall(r'class="tick end"[^>]*>([^<]*)<', svg)
    assert len(labels) == len(set(labels)) >= 3


def test_curves_are_grouped_by_what_they_measure() -> None:
    rows = [
        {
            "step": i,
            "images": 1024 * i,
            "loss": 10.0 / (1 + i**2),
            "loss_u": 1.0,
            "region": None if i == 0 else 0.5,
            "cosine_level_0": 0.1 * i,
            "cosine_level_1": 0.2 * i,
            "raw_mse_u": 2.0 - 0.1 * i,
            "images_per_second": 900.0,
            "preset": "tiny",
        }
        for i in range(8)
    ]
    rows = [json.loads(json.dumps(row)) for row in rows]
    plots = {plot.title: plot for plot in training_plots(rows)}
    falls = "squared errors: what falls in training"
    assert list(plots) == [falls, "losses", "cosine per level", "images per second"]
    assert [series.name for series in plots[falls].series] == ["u, average velocity"]
    assert [series.name for series in plots["losses"].series] == ["loss", "loss_u", "region"]
    assert [series.name for series in plots["cosine per level"].series] == ["level 0", "level 1"]
    assert plots["losses"].log_y
    assert not plots["cosine per level"].log_y
    assert list(plots["losses"].series[2].x) == [1024 * i for i in range(1, 8)]
    assert plots["losses"].x_label == "images seen"


def test_contact_sheet_shows_every_canvas_and_picture() -> None:
    trajectories = [trajectory(seed) for seed in range(3)]
    palette = page_palette(trajectories)
    sheet = np.asarray(trajectory_grid_png(trajectories, palette))
    found = {tuple(colour) for colour in sheet.reshape(-1, 3)}
    for shown in trajectories:
        canvases = palette.apply(shown.canvases)
        assert {tuple(colour) for colour in canvases.reshape(-1, 3)} <= found


def test_headings_of_a_contact_sheet_stay_in_their_columns() -> None:
    plain = TrajectoryView(label_name="goldfish", seed=1, canvases=trajectory().canvases)
    heading = np.asarray(trajectory_grid_png([plain]))[MARGIN_PX : MARGIN_PX + HEADER_PX - GAP_PX]
    end = MARGIN_PX + LABEL_PX + CELL_PX + 2 * GAP_PX  # of the first column, which has the longest name
    assert (heading[:, end - GAP_PX : end] == PAPER).all()


def test_contact_sheet_refuses_trajectories_of_different_depth() -> None:
    short = TrajectoryView(label_name="goldfish", seed=1, canvases=trajectory().canvases[:2])
    with pytest.raises(ValueError, match=r"found trajectories of \[2, 4\] levels"):
        trajectory_grid_png([trajectory(), short])
    with pytest.raises(ValueError, match="found trajectories of no levels"):
        trajectory_grid_png([])
