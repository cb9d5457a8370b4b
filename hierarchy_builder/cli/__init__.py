"""The command `hierarchy-builder`."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Run the command and leave with its exit code; Ctrl-C while modules load ends with 130 and no traceback."""
    try:
        from hierarchy_builder.machine.process import prepare

        prepare()
        from hierarchy_builder.cli.app import main as run_app
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_app()
