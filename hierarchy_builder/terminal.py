"""What the command lines of this package print, and how they end. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hierarchy_builder.errors import InterruptedRunError, UserError, explained

stdout, stderr = Console(), Console(stderr=True)
CTRL_C = 130
"""The exit code click makes of KeyboardInterrupt."""


def run(command: Callable[[], Any], *, continues: bool = False) -> NoReturn:
    """Run a command line of this project and leave with the exit code of what happened.

    continues: whether every verb continues finished work when it is given again. SIGTERM then ends with exit code
    75; without it SIGTERM keeps its own meaning (exit code 143).
    """
    if continues:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except (UserError, InterruptedRunError) as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        _end(explained(error), UserError.exit_code)
    except SystemExit as end:
        if continues and end.code == signal.SIGTERM:  # while Ray starts, the handler is its own
            sys.exit(InterruptedRunError.exit_code)
        if continues and end.code == CTRL_C:
            stderr.print("stopped; the same command goes on from the last finished unit")
        raise
    sys.exit(0)


def _end(message: str, exit_code: int) -> NoReturn:
    stderr.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the tidying up that follows
    raise InterruptedRunError("stopped by SIGTERM; the same command goes on from the last finished unit")


def show_config(config: Mapping[str, Any], quiet: bool) -> None:
    """The resolved configuration, as YAML on stderr."""
    if not quiet:
        stderr.print(
            yaml.safe_dump(config, sort_keys=False).rstrip(), markup=False, highlight=False, style="dim"
        )


def print_stages(summaries: Sequence[Any], as_json: bool) -> None:
    """What each stage of a run did: `session.StageSummary`."""
    rows = [summary.as_row() for summary in summaries]
    if as_json:
        print_json(rows)
        return
    from hierarchy_builder.canvases.gallery import show_value  # loads torch

    table = Table("stage", "images", "new", "seconds", "images/s", "bytes", "notes")
    for row in rows:
        notes = escape(show_value(row["notes"])) if row["notes"] else ""
        rate = f"{row['images_per_second']:.1f}" if row["new_images"] else "-"
        table.add_row(
            row["stage"],
            f"{row['images']:,}",
            f"{row['new_images']:,}",
            f"{row['seconds']:.1f}",
            rate,
            f"{row['num_bytes']:,}",
            notes,
        )
    stdout.print(table)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same fields under a title."""
    from hierarchy_builder.canvases.gallery import show_value  # loads torch

    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(show_value(value)) for value in row.values()))
    stdout.print(table)


def print_json(content: Any) -> None:
    """What `--json` prints."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
