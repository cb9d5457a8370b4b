"""The lock holds every package that the project depends on, within its range and with hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def test_the_lock_covers_the_dependencies() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^([\w.-]+)==(\S+)((?:.*\\\n)+ +--hash=sha256:\w{64})", text, re.MULTILINE)
    locked = {canonicalize_name(name): version for name, version, _ in entries}
    assert len(locked) == len(re.findall(r"^[\w.-]+(?:\[.*\])?==", text, re.MULTILINE))  # each with a hash
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        needed = Requirement(line)
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)]), line


def test_the_lock_names_no_host() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-")]


def test_the_dockerfile_installs_the_lock_and_copies_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+)", text, re.MULTILINE) for name in line.split()[:-1]]
    assert "requirements.lock" in copied
    assert "pip install --require-hashes -r requirements.lock" in text
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == sent
    assert not [name for name in copied if not (ROOT / name).exists()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= set(copied)
