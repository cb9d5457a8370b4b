"""Ctrl-C while modules load: exit code 130 and no traceback, at the first import and inside a verb alike."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Ctrl-C at the very moment in which a module is looked for.
PROGRAM = """
import sys

_, stop_at, module, *words = sys.argv

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == stop_at:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
sys.argv = [module, *words]
__import__(module, fromlist=["main"]).main()
"""


@pytest.mark.parametrize(
    ("stop_at", "words"),
    [
        ("typer", ["trainer.cli", "presets"]),
        ("trainer.cli.options", ["trainer.cli", "presets"]),
        ("torch", ["trainer.cli", "sample", ".", "--labels", "0", "--out", "samples"]),
        ("typer", ["hierarchy_builder.cli", "encoders"]),
        ("hierarchy_builder.store.folder", ["hierarchy_builder.cli", "encoders"]),
        ("torch", ["hierarchy_builder.cli", "encoders"]),
    ],
)
def test_ctrl_c_while_modules_load(stop_at: str, words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, stop_at, *words], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stderr
