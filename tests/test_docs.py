"""The documentation names what exists: commands, pages, files and importable names."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from hierarchy_builder.fields import known_fields
from trainer.methods.registry import all_presets

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GUIDES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + PAGES
FILE = re.compile(r"`((?:hierarchy_builder|trainer|pipelines|tests|examples|benchmarks|docs)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def commands() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_commands", DOCS / "write_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_page_is_up_to_date_on_a_narrow_terminal(
    commands: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert commands.main(["--check"]) == 0, capsys.readouterr().err


def test_check_fails_where_the_page_differs_and_writing_it_helps(
    commands: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "commands.md"
    monkeypatch.setattr(commands, "PAGE", page)
    page.write_text(commands.page().replace("`--out PATH`", "`--output PATH`"), encoding="utf-8")
    assert commands.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert "-| `--output PATH`" in message
    assert "make commands" in message
    assert commands.main([]) == 0
    assert commands.main(["--check"]) == 0


def test_configuration_page_is_up_to_date(
    commands: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    configuration = importlib.import_module("write_configuration")
    assert configuration.main(["--check"]) == 0, capsys.readouterr().err
    page = configuration.page()
    for method in all_presets().values():
        missing = [name for name in known_fields(type(method())) if f"`{name}`" not in page]
        assert set(missing) <= {"method_name", "post_training"}


@pytest.mark.parametrize("program", ["hierarchy-builder", "trainer"])
def test_every_option_that_help_prints_is_on_the_page(commands: ModuleType, program: str) -> None:
    app = commands.builder if program == "hierarchy-builder" else commands.trainer
    page, run = commands.page(), CliRunner(env={"COLUMNS": "200"})
    verbs = [found.name or found.callback.__name__.replace("_", "-") for found in app.registered_commands]
    assert len(verbs) > 10
    for verb in verbs:
        section = page.split(f"### {program} {verb}\n")[1].split("\n### ")[0]
        printed = run.invoke(app, [verb, "--help"]).stdout
        options = set(re.findall(r"^[ │*]+(?:-\w, ?)?(--[\w-]+)", printed, re.M)) - {"--help"}
        assert options, f"the help of {verb} was not understood"
        assert options == {name for name in options if name in section}, verb


@pytest.mark.parametrize("page", [page.name for page in PAGES if page.name != "index.md"])
def test_every_page_is_on_the_start_page_and_in_the_menu(page: str) -> None:
    assert f"]({page})" in (DOCS / "index.md").read_text(encoding="utf-8")
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert page in [name for entry in menu for name in entry.values()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_files_and_links_of_a_guide_exist(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    missing += [
        link for link in LINK.findall(text) if "://" not in link and not (guide.parent / link).exists()
    ]
    assert missing == [], f"{guide.name} names what does not exist"


def test_every_folder_of_the_packages_is_in_the_tour() -> None:
    tour = (DOCS / "tour.md").read_text(encoding="utf-8")
    folders = [
        path.parent.name
        for name in ("hierarchy_builder", "trainer")
        for path in ROOT.glob(f"{name}/*/__init__.py")
    ]
    assert len(folders) > 20
    assert [name for name in folders if f"`{name}/`" not in tour] == []


def test_no_page_of_the_site_loads_from_the_network() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:script|img|link|iframe)\b|```mermaid", text), (
            page.name
        )


@pytest.mark.parametrize("name", re.findall(r"^::: ([\w.]+)", (DOCS / "reference.md").read_text(), re.M))
def test_names_of_the_reference_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_import_lines_of_the_reference_run() -> None:
    lines = re.findall(r"^from [\w.]+ import .+$", (DOCS / "reference.md").read_text(), re.M)
    assert len(lines) > 5
    for line in lines:
        exec(line, {})
