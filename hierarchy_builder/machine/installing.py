"""The commands that add packages to the Python that runs: for `doctor`, and for errors about what is not installed."""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import sys
from pathlib import Path

from hierarchy_builder.files.untrusted.documents import parse_json

DISTRIBUTION = "trajectory-hierarchies"
SOURCES = Path(__file__).resolve().parents[2]
"""Where pyproject.toml lies, if the toolkit runs from its sources."""


def pip_install(*wanted: str) -> str:
    """The command that installs packages into this Python."""
    return f"{this_pip()} install {shlex.join(wanted)}"


def this_pip() -> str:
    """How the pip of this Python is called: by its name, where the shell finds that one."""
    beside = Path(sys.executable).with_name("pip")
    return "pip" if shutil.which("pip") == str(beside) else f"{shlex.quote(sys.executable)} -m pip"


def install_extras(*extras: str) -> str:
    """The command that adds extras of this toolkit, from where it was installed: no package index holds it."""
    listed = f"[{','.join(extras)}]" if extras else ""
    if (SOURCES / "pyproject.toml").is_file():
        return pip_install("-e", f"{SOURCES}{listed}")
    return pip_install(f"{DISTRIBUTION}{listed}{_origin()}")


def _origin() -> str:
    """`` @ URL`` of what pip installed, as a requirement names it; nothing where pip kept no URL."""
    try:
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    told = parse_json(text) if text else {}
    if "url" not in told:
        return ""
    system = told.get("vcs_info")
    return f" @ {system['vcs']}+{told['url']}@{system['commit_id']}" if system else f" @ {told['url']}"
