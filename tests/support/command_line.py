"""The commands `hierarchy-builder` and `trainer`, run in this process, for a network that trains in a second."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import signal
from typing import Any, NamedTuple

import pytest

TINY = (
    "model.width=16",
    "model.depth=2",
    "model.head_depth=1",
    "model.num_heads=2",
    "optim.ema_halflives_kimg=[0.05]",
    "checkpoint_images=16",
    "log_images=8",
)
SETTINGS = [part for setting in TINY for part in ("--set", setting)]
MODULES = {
    "hierarchy-builder": "hierarchy_builder.cli",
    "trainer": "trainer.cli",
    "pipelines.train": "pipelines.train",
}


class Ended(NamedTuple):
    """What a command left behind: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The content of stdout, for a command with `--json`."""
        return json.loads(self.out)


def cli(program: str, *words: object, columns: int = 200) -> Ended:
    """Run `program` with these arguments, as its console script does."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", str(columns))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = exit_code(program, *words)
    return Ended(code, out.getvalue(), err.getvalue())


def exit_code(program: str, *words: object) -> int:
    """The same, writing to the stdout and stderr of this process; the handler of SIGTERM is put back."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(MODULES[program]).main()
    signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def call(*words: object) -> int:
    """Exit code of `trainer` with these arguments."""
    return exit_code("trainer", *words)


def code_and_error(*words: object) -> tuple[int, str]:
    """Exit code of `trainer` with these arguments, and what it wrote to stderr."""
    ended = cli("trainer", *words)
    return ended.code, ended.err


def trainer(*words: object, code: int = 0) -> Ended:
    """What `trainer` with these arguments wrote; it has to end with `code`."""
    ended = cli("trainer", *words)
    assert ended.code == code, ended
    return ended
