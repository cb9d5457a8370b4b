"""The command `trainer` in this process, for a network that trains in a second."""

from __future__ import annotations

import pytest

from trainer.cli import app as cli

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


def call(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["trainer", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code
