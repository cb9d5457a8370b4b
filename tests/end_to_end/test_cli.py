"""The command line as a user meets it: real processes, their exit codes and their last line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import cli
from pictures import write_tree

BUILDER = [sys.executable, "-m", "hierarchy_builder.cli"]


def run(*words, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*BUILDER, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **environment},
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("photos"), per_class=2)


@pytest.fixture(scope="module")
def built(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "build"
    done = run("build", photos, "--out", out, "--encoder", "dct", "--workers", 0, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["stage"] for row in rows] == ["extract", "cluster", "shard"]
    assert all(row["images"] == 6 for row in rows)
    return out


def test_status_verify_and_report(built) -> None:
    rows = cli("hierarchy-builder", "status", built, "--json").json
    assert [(row["stage"], row["state"]) for row in rows] == [
        ("extract", "done"),
        ("cluster", "done"),
        ("shard", "done"),
    ]
    verified = run("verify", built)
    assert (verified.returncode, "everything is in order" in verified.stdout) == (0, True)
    report = cli("hierarchy-builder", "report", built, "--samples", 3)
    assert report.code == 0, report.err
    assert "<html" in (built / "report.html").read_text()


def test_steps_one_by_one_take_the_folder(photos, tmp_path) -> None:
    out = tmp_path / "build"
    for words in (
        ("extract", photos, "--out", out, "--encoder", "dct"),
        ("extract", out),
        ("cluster", out, "--cuts", "0.6,0.4,0.2", "--vocabulary", "2,4", "--backend", "torch"),
        ("cluster", out),
        ("shard", out, "--split", "val", "--samples-per-shard", 4),
        ("shard", out),
    ):
        done = cli("hierarchy-builder", *words, "--workers", 0, "--quiet")
        assert done.code == 0, done.err
    assert sorted(path.name for path in (out / "shards").glob("*.tar")) == [
        "val-000000.tar",
        "val-000001.tar",
    ]
    page = cli("hierarchy-builder", "report", out, "--vocabulary", "--prototypes", 3)
    assert page.out.strip() == str(out / "vocabulary.html"), page.err
    assert (out / "vocabulary.html").read_text().count('class="strip"') == 3


def test_config_file_flag_and_environment(photos, tmp_path, monkeypatch) -> None:
    config = tmp_path / "build.yaml"
    config.write_text("extract: {encoder: dct, block_rows: 4}\nhierarchy: {cuts: [0.5]}\n")
    monkeypatch.setenv("HIERARCHY_BUILDER_CONFIG", str(config))
    monkeypatch.setenv("HIERARCHY_BUILDER_WORKERS", "0")
    done = cli("hierarchy-builder", "build", photos, "--out", tmp_path / "build", "--cuts", "0.4", "--json")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "build" / "manifest.json").read_text())
    assert manifest["stages"]["extract"]["inputs"]["config"]["block_rows"] == 4
    assert manifest["stages"]["cluster"]["inputs"]["config"]["cuts"] == [0.4]
    assert "block_rows: 4" in done.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("build", "{photos}", "--out", "{out}", "--encoder", "dcp"), 2, "did you mean 'dct'"),
        (("build", "{missing}", "--out", "{out}", "--encoder", "dct"), 2, "{missing}"),
        (("build", "{empty}", "--out", "{out}", "--encoder", "dct"), 1, "no images"),
        (("build", "{photos}", "--out", "{out}", "--encoder", "dct", "--cuts", "0.2,0.8"), 2, "falling heights"),
        (("build", "{photos}", "--out", "{out}", "--encoder", "dct", "--cuts", "a"), 2, "expected numbers"),
        (("build", "{photos}", "--out", "{out}", "--encoder", "dinov2-reg-base"), 1, "--weights"),
        (("build", "{photos}", "--out", "{out}", "--config", "{config}"), 2, "did you mean 'block_rows'"),
        (("build", "{photos}", "--out", "{built}", "--encoder", "dct", "--block-rows", "3"), 5, "32 there, 3 now"),
        (("cluster", "{empty}"), 2, "is not a build"),
        (("shard", "{built}", "--samples-per-shard", "3"), 5, "samples_per_shard: 1000 there, 3 now"),
        (("report", "{built}", "--keys", "no/such"), 2, "no usable image no/such"),
        (("cluster", "{built}", "--vocabulary", "8,4"), 2, "expected rising numbers (coarse → fine)"),
        (("cluster", "{built}", "--vocabulary", "many"), 2, "expected sizes such as 256 or 64,512,4096"),
        (("cluster", "{built}", "--vocabulary", "8,70000"), 2, "from 1 to 65535"),
        (("report", "{built}", "--vocabulary"), 1, "--vocabulary 256` first"),
        (("build", "{photos}"), 2, "--out"),
        (("build", "{photos}", "--out", "{config}", "--encoder", "dct"), 2, "expected a folder to write to"),
        (("build", "{photos}", "--out", "{photos}/build", "--encoder", "dct"), 2, "lies inside the images"),
        (("build", "", "--out", "{out}", "--encoder", "dct"), 2, "it is empty, expected a path"),
        (("build", "{photos}", "--out", "{out}", "--encoder", "dct", "--seed", "-1"), 2, "seed is -1"),
        (("build", "{photos}", "--out", "{out}", "--config", "{number}"), 2, "section extract is 3, expected fields"),
        (("build", "{photos}", "--out", "{out}", "--config", "{binary}"), 2, "config file {binary}"),
        (("report", "{built}", "--out", "{config}/page.html"), 1, "{config}"),
    ],
)  # fmt: skip
def test_bad_input_says_what_to_do(words, code, text, photos, built, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.yaml").write_text("extract: {block_row: 3}\n")
    (tmp_path / "number.yaml").write_text("extract: 3\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    places = {
        "photos": photos,
        "built": built,
        "missing": tmp_path / "missing",
        "empty": tmp_path / "empty",
        "out": tmp_path / "out",
        "config": tmp_path / "config.yaml",
        "number": tmp_path / "number.yaml",
        "binary": tmp_path / "binary.yaml",
    }
    workers = () if words[0] == "report" else ("--workers", 0)
    done = cli("hierarchy-builder", *(str(word).format(**places) for word in words), *workers)
    assert done.code == code, done.err
    assert text.format(**places) in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_refused_process_ends_with_its_exit_code(built) -> None:
    done = run("shard", built, "--samples-per-shard", "3")
    assert done.returncode == 5, done.stderr
    assert "error" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_damage_ends_with_exit_code_4(built, tmp_path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    (copy / "shards" / "_SUCCESS").unlink()
    done = cli("hierarchy-builder", "verify", copy, "--json")
    assert done.code == 4
    assert "_SUCCESS is missing" in done.json["problems"][0]


def test_encoders_lists_the_method_first() -> None:
    names = [row["name"] for row in cli("hierarchy-builder", "encoders", "--json").json]
    assert names[0].startswith("dinov2-reg")
    assert {"dinov2-reg-base", "dct"} <= set(names)
