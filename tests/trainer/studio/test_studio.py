"""The studio in a browser: generate, select, edit, resume, compare, sweep, save, reload; no word to the network."""

from __future__ import annotations

import copy
import http.client
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import GRID, tiny_pipeline

from trainer.studio.board import CELL_PX, GAP_PX, HEADER_PX
from trainer.studio.workbench import quoted
from trainer.trajectories.trajectory import Trajectory

# Only the process that runs these tests imports gradio, which takes seconds.
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:gradio.*"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="the extra studio is not installed"),
]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    from trainer.studio.app import launch

    folder = tmp_path_factory.mktemp("studio") / "kept"
    page, url = launch(tiny_pipeline(), folder, block=False)
    yield url, folder
    page.close()


@pytest.fixture
def page(browser: Any, studio: tuple[str, Path]) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1400, "height": 1100})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(studio[0])
    says(page, "This is a first trajectory")
    # Boxes are made as a tab is opened, and may lose what is written meanwhile.
    for tab in ("Sweep", "Files", "Edit"):
        page.get_by_role("tab", name=tab).click()
    yield page
    page.close()
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {studio[0].split("/")[2]}


def click_token(page: Any, level: int, row: int, column: int, view: int = 0) -> None:
    page.wait_for_function("document.querySelector('#board img')?.naturalWidth > 0")
    board = page.locator("#board img")
    box = board.bounding_box()
    scale = box["width"] / board.evaluate("image => image.naturalWidth")
    x = level * (CELL_PX + GAP_PX) + (column + 0.5) * CELL_PX / GRID[1]
    y = HEADER_PX + view * (CELL_PX + GAP_PX) + (row + 0.5) * CELL_PX / GRID[0]
    page.mouse.click(box["x"] + scale * x, box["y"] + scale * y)


def fill(page: Any, name: str, text: str) -> None:
    """Write into a box and leave it, as the page takes note of its content then."""
    box = page.get_by_role("textbox", name=name, exact=True)
    box.wait_for()
    box.fill(text)
    box.press("Tab")


def says(page: Any, text: str) -> None:
    page.locator("#status").get_by_text(text).wait_for(timeout=20_000)


def test_generate_edit_resume_compare_save_reload(page: Any, studio: tuple[str, Path]) -> None:
    _, folder = studio
    page.get_by_role("button", name="Generate").click()
    says(page, "Click a region on the board")
    page.get_by_role("button", name="Apply features").click()
    says(page, "nothing is selected: click a token")
    click_token(page, level=1, row=1, column=1, view=2)
    says(page, "of level 1 selected")
    page.get_by_role("button", name="Take mean").click()
    says(page, "Taken.")
    page.get_by_label("one token").check()
    click_token(page, level=1, row=5, column=4)
    says(page, "1 token of level 1 selected")
    page.get_by_role("button", name="Apply features").click()
    says(page, "Edited.")
    page.get_by_role("button", name="Resume", exact=True).click()
    says(page, "Drawn.")
    page.get_by_text("replaced the features of 1 token of level 1").wait_for()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    says(page, "Compared with the pinned trajectory.")
    page.locator("#comparison img").wait_for()
    page.locator("#slider img").first.wait_for()
    page.locator("#scores").get_by_text("share of tokens changed").first.wait_for(state="attached")
    page.get_by_role("tab", name="Files").click()
    fill(page, "Name", "../escape")
    page.get_by_role("button", name="Save", exact=True).click()
    says(page, "the name is '../escape'")
    fill(page, "Name", "mine")
    for button, suffix in (
        ("Save", "safetensors"),
        ("Export HTML", "html"),
        ("Export report (Markdown)", "md"),
    ):
        page.get_by_role("button", name=button, exact=True).click()
        says(page, f"mine.{suffix}")
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Download mine.md").click()
    assert Path(downloaded.value.path()).read_bytes() == (folder / "mine.md").read_bytes()
    page.get_by_role("button", name="Undo").click()
    says(page, "Undone: drew the levels after 1 again")
    page.locator("body").press("u")
    says(page, "Undone: replaced the features of 1 token")
    kept = Trajectory.load(folder / "mine.safetensors")
    assert [entry["edit"] for entry in kept.history] == ["features", "resume"]
    fresh = tiny_pipeline()(label="ant", seed=0)
    assert torch.equal(kept.levels[0], fresh.levels[0])
    assert (kept.levels[1] != fresh.levels[1]).any(dim=-1).nonzero().tolist() == [[5, 4]]
    assert "<html" in (folder / "mine.html").read_text()
    assert "1. replaced the features of 1 token" in (folder / "mine.md").read_text()
    page.get_by_text("● not saved").wait_for()
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.reload()
    assert asked == ["beforeunload"]
    says(page, "This is a first trajectory")
    page.get_by_role("tab", name="Files").click()
    page.locator("#saved input").click()
    page.get_by_role("option", name="mine").click()
    page.get_by_role("button", name="Load", exact=True).click()
    says(page, "Loaded.")
    page.get_by_role("tab", name="Edit").click()
    page.get_by_text("replaced the features of 1 token of level 1").wait_for()
    assert sorted(re.sub(r".*\.", "", path.name) for path in folder.iterdir() if path.is_file()) == [
        "html",
        "md",
        "safetensors",
    ]
    assert not (folder.parent / "escape.safetensors").exists()


def test_a_sweep_has_its_baselines(page: Any) -> None:
    page.get_by_role("button", name="Generate").click()
    says(page, "Click a region on the board")
    page.get_by_role("tab", name="Sweep").click()
    fill(page, "Seeds", "0,1")
    fill(page, "Strengths", "1")
    page.get_by_role("button", name="Run the sweep").click()
    says(page, "Seeds swept: 2.")
    for arm in ("no edit", "other noise"):
        page.get_by_text(arm, exact=True).first.wait_for(state="attached")
    fill(page, "Strengths", "much")
    page.get_by_role("button", name="Run the sweep").click()
    says(page, "strengths are 'much', expected numbers")


def test_numbers_out_of_bounds_are_answered_in_the_page(page: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for name, number, answer in (
        ("Steps", "5000", "steps per level are 5000, expected 1 to 1,000"),
        ("Steps", "0", "steps per level are 0, expected 1 to 1,000"),
        ("Seed", "-4", "seed -4, expected 0 to"),
        ("Temperature", "-1", "temperature is -1, expected a finite number of 0 or more"),
    ):
        page.reload()
        says(page, "This is a first trajectory")
        box = page.get_by_label(name, exact=True)
        box.fill(number)
        box.press("Tab")
        page.get_by_role("button", name="Generate").click()
        says(page, answer)
    assert "Traceback" not in capfd.readouterr().err


def test_a_drawing_is_cancelled_while_another_user_works(page: Any, browser: Any, studio: Any) -> None:
    from playwright.sync_api import TimeoutError

    other = browser.new_page(viewport={"width": 390, "height": 844})
    other.goto(studio[0])
    says(other, "This is a first trajectory")
    for tab in ("Edit", "Paint", "Compare", "Sweep", "Files"):  # none is behind a menu of further tabs
        other.get_by_role("tab", name=tab).wait_for(timeout=5_000)
    assert other.evaluate("document.documentElement.scrollWidth") <= 390
    click_token(other, level=1, row=1, column=1)
    says(other, "of level 1 selected")
    other.get_by_role("button", name="Take mean").click()
    says(other, "Taken.")
    assert other.locator("#status").bounding_box()["height"] < 65  # at most three lines
    steps = page.get_by_label("Steps", exact=True)
    steps.fill("1000")
    steps.press("Tab")
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_role("button", name="Generate").click()
    other.get_by_label("Seed", exact=True).fill("7")
    other.get_by_role("button", name="Generate").click()
    stopped = page.locator("#status").get_by_text("stopped: nothing was changed")
    for _ in range(20):  # the drawing may not have begun when Stop is first pressed
        page.get_by_role("button", name="Stop").click()
        try:
            stopped.wait_for(timeout=1000)
            break
        except TimeoutError:
            continue
    says(page, "stopped: nothing was changed")
    says(page, "seed 0")
    says(other, "ant, seed 7")
    other.close()


def test_every_control_has_a_tooltip_and_fits_its_box(page: Any) -> None:
    names = page.evaluate(
        """[...document.querySelectorAll('.gradio-container button.lg, .gradio-container button.sm')]
           .filter(b => b.offsetParent && b.textContent.trim() && !b.closest('[title]'))
           .map(b => b.textContent.trim())"""
    )
    assert names == []
    for width in (390, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        out = page.evaluate(
            """[...document.querySelectorAll('input[type=range]')].filter(input => {
                const own = input.getBoundingClientRect(), box = input.closest('.block').getBoundingClientRect();
                return own.width && (own.left < box.left || own.right > box.right);
            }).length"""
        )
        assert out == 0, width
    assert not page.locator("#scores, #comparison, #slider").first.is_visible()


def test_every_control_has_an_entry_in_the_script(tmp_path: Path) -> None:
    from trainer.studio.app import MOST_STEPS, SCRIPT, build_studio

    tips = set(re.findall(r'^    "?([\w-]+)"?: ".*",$', SCRIPT, re.MULTILINE))
    kinds = {"button", "downloadbutton", "number", "radio", "slider", "textbox", "dropdown", "checkboxgroup"}
    parts = build_studio(tiny_pipeline(), tmp_path).get_config_file()["components"]
    assert {part["props"]["elem_id"] for part in parts if part["type"] in kinds} == tips - {
        "prototype",
        "take-prototype",  # of a vocabulary, which this page has not
    }
    assert f"1 to {MOST_STEPS:,};" in SCRIPT


def test_the_studio_answers_on_this_machine_alone(studio: tuple[str, Path]) -> None:
    assert studio[0].startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_requests_of_other_names_and_sites_are_refused(
    studio: tuple[str, Path], headers: dict[str, str]
) -> None:
    address = studio[0].split("/")[2]
    for given, status in (({}, 200), (headers, 403)):
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request("GET", "/", headers=given)
        assert connection.getresponse().status == status
        connection.close()


def test_what_has_no_bound_is_refused_and_work_can_be_stopped(tmp_path: Path) -> None:
    from trainer.studio.app import build_studio
    from trainer.studio.desk import Desk, Seat
    from trainer.studio.folder import StudioFolder
    from trainer.studio.workbench import Workbench

    pipe = tiny_pipeline()
    steps = {fn.name: fn.fn for fn in build_studio(pipe, tmp_path).fns.values()}
    assert {"act", "stop"} <= set(steps)
    desk = Desk(pipe, StudioFolder(tmp_path), None)
    mine, other = Seat(), copy.deepcopy(desk.seat.value)
    for empty in (None, "", []):
        assert "no class is chosen" in desk.take(mine, lambda _, value=empty: desk.chosen(value))[1]

    def drawn(bench: Workbench) -> Workbench:
        desk.stop(mine)  # as the button does, from another thread
        assert desk.take(other, lambda bench: bench.open(pipe(1, 0)))[1].startswith("class **bee**")
        return bench.open(pipe(0, 0, num_steps=5))

    _, said, _, _ = desk.take(mine, drawn)
    assert (mine.bench.trajectory, said) == (None, "⚠ stopped: nothing was changed")
    assert other.bench.current().label == 1  # neither stopped by another user nor waiting for one
    assert desk.stop(mine) == "Nothing is being drawn."
    assert pipe(0, 0).label == 0  # outside of the page nothing is stopped


def test_names_and_messages_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "![x](http://evil.example/a.png) <img src=//evil.example>"
    text = quoted(name)
    assert not any(mark in text for mark in ("![", "](", "<"))
    address = quoted(
        "http://evil.example WWW.evil.example me@evil.example"
    )  # which the page would make links of
    assert address == r"http\://evil.example WWW\.evil.example me\@evil.example"
    assert quoted("ant, seed 3: 1.5 – café") == "ant, seed 3: 1.5 – café"
