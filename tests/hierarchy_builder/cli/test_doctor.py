"""`doctor` finds what does not fit, says what mends it, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path

import pytest
from command_line import cli
from packaging.requirements import Requirement

from hierarchy_builder.machine import doctor, installing
from hierarchy_builder.machine.doctor import Finding


@pytest.mark.parametrize("program", ["hierarchy-builder", "trainer"])
def test_doctor_looks_at_everything_and_can_print_json(program: str, tmp_path: Path) -> None:
    ended = cli(program, "doctor", tmp_path, "--json", "--quiet")
    assert ended.err == ""
    rows = ended.json
    blocks = [row for row in rows if row["state"] == "blocks"]
    assert ended.code == bool(blocks)
    assert all(row["mend"] for row in blocks)
    assert {"Python", "GPU", "weights", "disk", "file locks", "shared memory", "Ray", "fonts", "browser"} <= {
        row["check"] for row in rows
    }
    assert not [row["found"] for row in rows if "could not be checked" in row["found"]]


def test_advice_to_install_names_where_the_toolkit_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (installing.SOURCES / "pyproject.toml").is_file()
    assert shlex.split(installing.install_extras("fid", "wandb"))[-2:] == [
        "-e",
        f"{installing.SOURCES}[fid,wandb]",
    ]
    monkeypatch.setattr(installing, "SOURCES", tmp_path)
    told = {"url": "https://host/toolkit", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    for text, origin in (
        (json.dumps(told), " @ git+https://host/toolkit@abc"),
        (json.dumps({"url": "file:///wheels/toolkit.whl"}), " @ file:///wheels/toolkit.whl"),
        (None, ""),
    ):
        (tmp_path / "METADATA").write_text("Name: trajectory-hierarchies")
        (tmp_path / "direct_url.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "direct_url.json").write_text(text)
        found = importlib.metadata.PathDistribution(tmp_path)
        monkeypatch.setattr(installing.importlib.metadata, "distribution", lambda name, found=found: found)
        assert shlex.split(installing.install_extras("fid"))[-1] == f"trajectory-hierarchies[fid]{origin}"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "_gpu", broken)
    assert dict(doctor.examined(Path()))["GPU"] == Finding(
        "note", "could not be checked: RuntimeError: no driver"
    )


def test_a_folder_that_cannot_be_written_blocks() -> None:
    ended = cli("trainer", "doctor", "/proc/no/such", "--json")
    assert ended.code == 1
    found = {row["check"]: row for row in json.loads(ended.out)}
    assert "/proc cannot be written" in found["file locks"]["found"]
    assert "will stop commands: file locks" in ended.err


@pytest.mark.parametrize(
    ("torch", "torchvision", "state", "mend"),
    [
        ("2.13.0+cpu", "0.28.0+cpu", "ok", ""),
        ("2.13.0", "0.27.1", "blocks", "install torch==2.13.0 'torchvision==0.28.*'"),
        ("2.13.0+cpu", "0.28.0", "note", "--index-url=https://download.pytorch.org/whl/cpu"),
    ],
)
def test_torch_and_torchvision_are_a_pair(
    torch: str, torchvision: str, state: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": torch, "torchvision": torchvision}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    (found,) = (each for each in doctor._pairs() if "torchvision" in each.found)
    assert found.state == state
    assert mend in found.mend


def test_two_builds_of_faiss_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def __init__(self, name: str) -> None:
            self.name = name

    names = [Installed("faiss-cpu"), Installed("faiss_gpu")]
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: names)
    (found,) = (each for each in doctor._pairs() if "faiss" in each.found and each.state == "blocks")
    assert found.mend.endswith("install faiss-gpu")
    assert "uninstall -y faiss-cpu faiss-gpu" in found.mend


def test_a_package_that_does_not_fit_is_named_with_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        doctor.DISTRIBUTION: [Requirement("ray>=1"), Requirement("zarr>=99")],
        "ray": [Requirement("protobuf<1")],
    }
    monkeypatch.setattr(doctor, "_requirements", lambda name: needs.get(name, []))
    monkeypatch.setattr(doctor, "_installed", lambda name: "3.0")
    blocking, noted = sorted(doctor._packages(), key=lambda each: each.state)
    assert (blocking.state, noted.state) == ("blocks", "note")
    assert "zarr is 3.0, trajectory-hierarchies needs >=99" in blocking.found
    assert "protobuf is 3.0, ray needs <1" in noted.found
