"""The report pages in a browser: sliders, divider, keyboard, touch, phone width, and no network access."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hierarchy_builder.canvases.gallery import Section, Table, write_page
from hierarchy_builder.canvases.views import HierarchyView
from hierarchy_builder.quality.report import hierarchy_page
from trainer.evaluation.pages import curves_section, training_page
from trainer.trajectories.view import TrajectoryView

PHONE = {"width": 375, "height": 812}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reports, three cards per gallery, long names, each picture of one colour per level."""
    folder = tmp_path_factory.mktemp("pages")
    views = [_view(number) for number in range(3)]
    trajectories = [
        TrajectoryView(
            label_name="American Staffordshire terrier", seed=n, canvases=view.levels(), decoded=view.decoded
        )
        for n, view in enumerate(views)
    ]
    stages = [
        {
            "stage": "extract",
            "images": 1_281_167,
            "skipped": 3,
            "seconds": 1021.4,
            "images per second": 1254.3,
        }
    ]
    facts = {"images": 1_281_167, "weights": "9f2c41d0c0de5a77b3e19f2c41d0c0de5a77b3e1", "cuts": (0.65, 0.35)}
    config = {"extract": {"encoder": "dct", "comment": "long " * 40}}
    log = [
        {"step": i, "images": 1024 * i, "loss": 1 / (i + 1), "images_per_second": 900 + i} for i in range(20)
    ]
    write_page(hierarchy_page(views, facts, stages, config), folder / "hierarchy.html")
    page = training_page(
        title="TF-B on a drawn data set",
        facts=facts,
        trajectories=trajectories,
        teachers=views,
        measured=[Section(title="Metrics", blocks=[Table(rows=stages)]), *curves_section(log)],
        config=config,
    )
    write_page(page, folder / "training.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator:
    """Open a page by name at a size; afterwards nothing was logged and nothing was asked of the network."""
    contexts, complaints = [], []

    def open_page(name: str, viewport: dict = DESKTOP, one: bool = True, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **{"reduced_motion": "reduce", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: _note_request(request.url, complaints))
        page.goto(pages[name].as_uri())
        for one_level in page.get_by_role("button", name="One level").all() if one else ():
            one_level.click()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def test_card_slider_moves_all_views_of_its_card_by_keyboard(opened: Any) -> None:
    page = opened("hierarchy")
    cards = page.locator(".card")
    slider = cards.nth(0).locator(".own-level")
    slider.focus()
    for key, level in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", 3), ("ArrowLeft", 2)):
        page.keyboard.press(key)
        assert _shown_levels(cards.nth(0)) == [level] * 3
    assert slider.get_attribute("aria-valuetext") == "subparts 2 regions".replace("/", "/\u200b")
    assert _shown_levels(cards.nth(1)) == [1, 1, 1]


def test_section_slider_sweeps_every_card(opened: Any) -> None:
    page = opened("training")
    for gallery, start in ((page.locator(".gallery").nth(0), 3), (page.locator(".gallery").nth(1), 1)):
        assert {level for card in gallery.locator(".card").all() for level in _shown_levels(card)} == {start}
        gallery.locator(".all-levels").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert {level for card in gallery.locator(".card").all() for level in _shown_levels(card)} == {2}
        gallery.locator(".ticks button").first.click()
        assert {level for card in gallery.locator(".card").all() for level in _shown_levels(card)} == {0}


def test_dragging_reveals_the_photo_left_of_the_divider(opened: Any) -> None:
    page = opened("hierarchy")
    frame = page.locator(".card").nth(0).locator(".view .frame").nth(1)
    before = _pixel(frame, 0.2)
    box = _box(frame)
    page.mouse.move(box["x"] + 4, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 12, steps=4)
    page.mouse.up()
    # The photo is one flat red (240, 20, 20): WebP may move it by a few grey values.
    assert np.abs(_pixel(frame, 0.2) - (240, 20, 20)).max() < 16
    assert np.abs(before - (240, 20, 20)).max() > 60
    assert np.abs(_pixel(frame, 0.85) - (240, 20, 20)).max() > 60
    grip = page.locator(".card").nth(0).get_by_role("slider", name="Reveal the photo")
    assert 58 <= int(grip.get_attribute("aria-valuenow")) <= 62


def test_divider_moves_by_keyboard_and_for_all_cards_at_once(opened: Any) -> None:
    page = opened("hierarchy")
    grips = page.get_by_role("slider", name="Reveal the photo", exact=True)
    grips.nth(0).focus()
    for key, percent in (
        ("End", "100"),
        ("ArrowLeft", "95"),
        ("Home", "0"),
        ("ArrowRight", "5"),
        ("PageUp", "25"),
    ):
        page.keyboard.press(key)
        assert grips.nth(0).get_attribute("aria-valuenow") == percent
    page.locator(".all-reveal").focus()
    page.keyboard.press("End")
    assert [grip.get_attribute("aria-valuenow") for grip in grips.all()] == ["100"] * 3


def test_divider_follows_a_finger(opened: Any) -> None:
    page = opened("training", PHONE, has_touch=True, is_mobile=True)
    card = page.locator(".card").nth(0)
    box = _box(card.locator(".view .frame").nth(1))
    touch = page.context.new_cdp_session(page)
    y = box["y"] + box["height"] / 2
    for kind, share in (("touchStart", 0.1), ("touchMove", 0.3), ("touchMove", 0.5), ("touchEnd", None)):
        points = [] if share is None else [{"x": box["x"] + share * box["width"], "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    grip = card.get_by_role("slider", name="Reveal the final picture")
    assert 45 <= int(grip.get_attribute("aria-valuenow")) <= 55


def test_all_levels_can_be_seen_side_by_side(opened: Any) -> None:
    page = opened("hierarchy", one=False)
    assert page.locator(".card").nth(0).locator(".source img").is_visible()
    images = page.locator(".card").nth(0).locator(".view").nth(0).locator("img:visible")
    lefts = [image.bounding_box()["x"] for image in images.all()]
    assert len(lefts) == 4
    assert lefts == sorted(set(lefts))
    page.get_by_role("button", name="One level").click()
    assert _shown_levels(page.locator(".card").nth(0)) == [1, 1, 1]
    samples = opened("training", one=False)  # also galleries without photos
    opens_with = samples.locator(".mode [aria-pressed=true]").all_text_contents()
    assert opens_with == ["All levels"] * samples.locator(".gallery").count()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_links_of_the_contents_lead_to_their_headings(opened: Any, motion: str) -> None:
    page = opened("training", {"width": 375, "height": 300}, one=False, reduced_motion=motion)
    links = page.locator("nav a")
    for number in range(links.count()):
        page.evaluate("scrollTo(0, 0)")
        links.nth(number).click()
        target = links.nth(number).get_attribute("href")
        # Cards get their heights as they come into view, above the heading and on the way to it.
        page.wait_for_function(
            """target => {
                const below = document.documentElement.scrollHeight - scrollY - innerHeight;
                const top = document.querySelector(target).getBoundingClientRect().top;
                return Math.abs(top) < 2 || (Math.abs(below) < 2 && top > 0 && top < innerHeight);
            }""",
            arg=target,
            timeout=5000,
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["hierarchy", "training"])
def test_phone_width_has_no_horizontal_overflow(opened: Any, name: str, scheme: str) -> None:
    page = opened(name, PHONE, color_scheme=scheme)
    page.locator("details").evaluate_all("all => all.forEach(details => details.open = true)")
    for mode in (
        page.get_by_role("button", name="levels").or_(page.get_by_role("button", name="One level")).all()
    ):
        mode.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    table = page.locator(".scroll").first
    is_cut = table.evaluate("box => box.scrollWidth > box.clientWidth")
    assert page.get_by_text("scroll it sideways").first.is_visible() == is_cut is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_is_at_least_4_5(opened: Any, scheme: str) -> None:
    page = opened("training", color_scheme=scheme)
    for selector, ground in (
        (".text", "body"),
        (".key", ".card"),
        ("figcaption", ".card"),
        ("nav a", "body"),
    ):
        ink, paper = (_colour(page, selector, "color"), _colour(page, ground, "backgroundColor"))
        light, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector


def test_pictures_have_texts_load_lazily_and_decode(opened: Any) -> None:
    page = opened("training")
    images = page.locator("img:not(.under)")
    described = images.evaluate_all(
        "all => all.every(i => i.alt && i.loading === 'lazy' && i.decoding === 'async')"
    )
    assert images.count() == 3 * 8 + 3 * 13
    assert described
    page.locator("#teacher-hierarchies").scroll_into_view_if_needed()
    page.wait_for_function(
        "[...document.querySelectorAll('.card:first-child .stack img')].every(i => i.naturalWidth)"
    )


def test_page_reads_without_javascript(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=DESKTOP)
    page = context.new_page()
    page.goto(pages["hierarchy"].as_uri())
    assert page.locator(".card").nth(0).locator(".view img:visible").count() == 12
    assert page.locator("input:visible, button:visible").count() == 0
    context.close()


def test_one_level_has_no_slider_of_levels(browser: Any, tmp_path: Path) -> None:
    view = _view(0)
    one = TrajectoryView(
        label_name="goldfish", seed=0, canvases=view.levels()[-1:], decoded=view.decoded[-1:]
    )
    write_page(training_page(title="run", facts={}, trajectories=[one]), tmp_path / "one.html")
    page = browser.new_page(viewport=DESKTOP)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "one.html").as_uri())
    assert page.locator(".own-level, .all-levels, .mode").count() == 0
    assert _shown_levels(page.locator(".card").nth(0)) == [0, 0]
    page.locator(".all-reveal").focus()
    page.keyboard.press("End")
    assert (
        page.get_by_role("slider", name="Reveal the final picture", exact=True).get_attribute("aria-valuenow")
        == "100"
    )
    page.close()
    assert complaints == []


def _view(number: int) -> HierarchyView:
    regions = np.zeros((3, 16, 16), dtype=np.uint8)
    regions[0, 4:12, 4:12] = 1
    regions[1] = regions[0]
    regions[2] = regions[0]
    regions[2, 8:12, 4:12] = 2
    features = np.random.default_rng(number).normal(size=(16, 16, 6)).astype(np.float32)
    features[4:12, 4:12] += 3
    decoded = np.stack([np.full((224, 224, 3), 60 * level, dtype=np.uint8) for level in range(4)])
    return HierarchyView(
        key=f"n01440764/a_key_that_does_not_end_{number:050d}",
        class_name="American Staffordshire terrier",
        regions=regions,
        features=features,
        photo=np.full((224, 224, 3), (240, 20, 20), dtype=np.uint8),
        decoded=decoded,
        notes={"separation": 0.4},
    )


def _note_request(url: str, complaints: list[str]) -> None:
    if not url.startswith(("file:", "data:")):
        complaints.append(f"requested {url}")


def _shown_levels(card: Any) -> list[int]:
    """The topmost layer that is visible in each view of a card."""
    return card.locator(".stack").evaluate_all(
        "stacks => stacks.map(s => [...s.children].findLastIndex(i => getComputedStyle(i).opacity === '1'))"
    )


def _box(frame: Any) -> dict:
    frame.scroll_into_view_if_needed()
    return frame.bounding_box()


def _pixel(frame: Any, share: float) -> np.ndarray:
    """Colour at a share of the width and a fifth of the height of a picture, as the screen shows it."""
    picture = np.asarray(Image.open(io.BytesIO(frame.screenshot())).convert("RGB")).astype(int)
    return picture[picture.shape[0] // 5, int(share * picture.shape[1])]


def _colour(page: Any, selector: str, name: str) -> tuple[float, ...]:
    text = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{name}")
    return tuple(float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3])


def _luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of sRGB 0..255. Source: WCAG 2.1."""
    unit = np.array(colour) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
