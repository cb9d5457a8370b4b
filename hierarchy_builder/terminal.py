"""What the command lines of both packages print, and how they end. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import numbers
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import yaml
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hierarchy_builder.errors import InterruptedRunError, UserError, explained, given_words
from hierarchy_builder.fields import flattened
from hierarchy_builder.files.paths import shown
from hierarchy_builder.files.remote import store_error, without_secrets
from hierarchy_builder.files.whole import without_nan

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
"""Settings of every console: text is printed as it is, also a name such as `[red]` or `:b:`."""
WHOLE_CHARACTERS, LEAST_CHARACTERS = 26, 16
"""A column of a table at most so wide is not broken over lines if the wider ones keep at least so many characters."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor of a terminal, colour it, or turn the direction of what follows."""


class Terminal(Console):
    """A console on which names that others gave, of classes or files, are only text: it shows controls as `\\x1b`."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a message or of a cell of a table."""
        return super().render_str(CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text), **options)


stdout, stderr = Terminal(**PLAIN), Terminal(stderr=True, **PLAIN)
CTRL_C = 130
"""The exit code click makes of KeyboardInterrupt."""


def run(command: Callable[[], Any], *, continues: bool = False, who: str = "") -> NoReturn:
    """Run a command line of this project and leave with the exit code of what happened.

    continues: whether every verb continues finished work when it is given again. SIGTERM then ends with exit code
    75; without it SIGTERM keeps its own meaning (exit code 143). who: begins errors, where several processes print to
    one terminal.
    """
    if continues:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except (UserError, InterruptedRunError) as error:
        _end(f"{who}{error}", error.exit_code)
    except Exception as error:
        if (told := store_error(error)) is not None:
            urls = ", ".join(shown(word) for word in given_words() if "://" in word)
            _end(f"{who}{urls}: {told}" if urls and not told.place else f"{who}{told}", told.exit_code)
        if not isinstance(error, OSError):
            raise
        _end(who + explained(error), UserError.exit_code)
    except SystemExit as end:
        if continues and end.code == signal.SIGTERM:  # while Ray starts, the handler is its own
            sys.exit(InterruptedRunError.exit_code)
        if continues and end.code == CTRL_C:
            stderr.print("stopped; the same command goes on from the last finished unit")
        raise
    sys.exit(0)


def _end(message: str, exit_code: int) -> NoReturn:
    stderr.print(f"error: {without_secrets(message)}", soft_wrap=True)
    sys.exit(exit_code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the tidying up that follows
    raise InterruptedRunError("stopped by SIGTERM; the same command goes on from the last finished unit")


def say(text: str, quiet: bool = False) -> None:
    """One message for the user on stderr, in lines as long as they are."""
    if not quiet:
        stderr.print(text, soft_wrap=True)


def say_next(where: str, commands: Sequence[Sequence[object]], quiet: bool) -> None:
    """The end of a command: where its result lies, and commands that can be pasted to go on."""
    if where:
        say(where, quiet)
    for words in commands:
        say(f"next: {shlex.join(map(str, words))}", quiet)


def show_config(config: Mapping[str, Any], quiet: bool) -> None:
    """The resolved configuration, as YAML on stderr."""
    if not quiet:
        stderr.print(yaml.safe_dump(config, sort_keys=False).rstrip(), style="dim")


def print_stages(summaries: Sequence[Any], as_json: bool) -> None:
    """What each stage of a run did: `session.StageSummary`."""
    rows = [summary.as_row() for summary in summaries]
    if as_json:
        print_json(rows)
        return
    cells = [
        (
            row["stage"],
            f"{row['images']:,}",
            f"{row['new_images']:,}",
            f"{row['seconds']:.1f}",
            f"{row['images_per_second']:.1f}" if row["new_images"] else "-",
            f"{row['num_bytes']:,}",
            show_value({name.replace("_", " "): value for name, value in row["notes"].items()}),
        )
        for row in rows
    ]
    print_cells(("stage", "images", "new", "seconds", "images/s", "bytes", "notes"), cells)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same fields under a title."""
    _print_heading(title, "")
    print_cells(tuple(rows[0]), [[show_value(value) for value in row.values()] for row in rows])


def print_result(content: Any, as_json: bool, title: str = "", note: str = "") -> None:
    """Print rows (a list of mappings of equal names) or one mapping, as JSON or as a table with literal values.

    title, note: lines above a table, such as what its numbers are measured against; JSON goes without.
    """
    if as_json:
        print_json(content)
        return
    _print_heading(title, note)
    if isinstance(content, list):
        names = tuple(content[0]) if content else ()
        print_cells(names, [[_literal(value) for value in row.values()] for row in content])
    else:
        flat = flattened(content)
        print_cells(("name", "value"), [(name, _literal(value)) for name, value in flat.items()])


def print_cells(names: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table of texts. A terminal that is too narrow breaks long values over lines, and never cuts any."""
    names, rows = list(names), [list(row) for row in rows]
    widths = [max(cell_len(each) for each in column) for column in zip(names, *rows, strict=True)]
    frame = 3 * len(names) + 1
    # Short columns stay whole where the long ones keep some room; all are broken where not even that fits.
    is_whole = [width <= WHOLE_CHARACTERS for width in widths]
    needed = sum(width if whole else LEAST_CHARACTERS for width, whole in zip(widths, is_whole, strict=True))
    fits = needed + frame <= stdout.width
    table = Table()
    for name, whole in zip(names, is_whole, strict=True):
        table.add_column(name, overflow="fold", no_wrap=whole and fits)
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def print_json(content: Any) -> None:
    """What `--json` prints; NaN is null. Where stdout is not UTF-8, other characters than ASCII are escaped."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") in ("utf8", "utf8sig")
    sys.stdout.write(json.dumps(without_nan(content), indent=2, ensure_ascii=not is_utf8) + "\n")


def show_value(value: Any) -> str:
    """A value as a reader expects it: grouped integers, four significant digits, yes and no, – for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        return f"{number:,.0f}" if 1e3 <= abs(number) < 1e15 else f"{number:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show_value(item) for item in value)
    return str(value)


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 image`, `1,204 images`; plural: of nouns that take more than an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _literal(value: Any) -> str:
    """A value as it is written in a configuration, since tables of results also hold seeds and settings."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_literal, value)) or "–"
    return show_value(value) if value is None or isinstance(value, bool) else str(value)


def _print_heading(title: str, note: str) -> None:
    # lines of their own: rich breaks the title of a table at the width of the table
    for text, style in ((title, "bold"), (note, "dim")):
        if text:
            stdout.print(text, style=style)
