"""Write docs/commands.md, the reference of both command lines, from the Typer apps themselves.

    python docs/write_commands.py            writes the page
    python docs/write_commands.py --check    writes nothing; exit code 1 where the page differs from the code

The text comes from the parameters and not from `--help`, so it depends neither on the width of a terminal nor on how
a release of Typer lays its help out.
"""

from __future__ import annotations

import difflib
import enum
import sys
import types
import typing
from pathlib import Path
from typing import Any

import typer

from hierarchy_builder.cli.app import app as builder
from trainer.cli.app import app as trainer

PAGE = Path(__file__).with_name("commands.md")
INTRODUCTION = """# Commands

<!-- Written by docs/write_commands.py (`make commands`). Edit the help texts in the code instead of this page. -->

This page lists every verb of `hierarchy-builder` and `trainer` with its arguments, options and defaults. An option
without a default is either off or takes its value from a preset, from a configuration file or from what the folder
already holds; its description says which. `VERB --help` prints the same texts, and [Configuration](configuration.md)
lists the fields that `--config` and `--set` take.

Results go to stdout, progress and messages to stderr. Exit codes: 0 success, 1 failure, 2 wrong usage, 3 more images
skipped than allowed, 4 verification failed, 5 configuration or input differs from what the folder was made with,
75 interrupted and resumable, 130 Ctrl-C, 143 SIGTERM.
"""


def page() -> str:
    """Return the whole text of docs/commands.md."""
    sections = [INTRODUCTION]
    for app in (builder, trainer):
        group: Any = typer.main.get_command(app)
        verbs = {name: verb for name, verb in group.commands.items() if not verb.hidden}
        listing = "\n".join(
            f"- [`{name}`](#{group.name}-{name}): {_first_sentence(verb.help)}"
            for name, verb in verbs.items()
        )
        sections.append(f"## {group.name}\n\n{group.help}\n\n{listing}\n")
        sections.extend(_verb(f"{group.name} {name}", verb) for name, verb in verbs.items())
    return "\n".join(sections)


def _verb(name: str, verb: Any) -> str:
    """Return the section of one verb: usage, help and one table for each group of options."""
    hints = {p.name: p.annotation for p in typer.main.get_params_from_function(verb.callback).values()}
    shown = [param for param in verb.params if param.name in hints and not getattr(param, "hidden", False)]
    usage = [name, *(_usage(param, hints[param.name]) for param in shown if param.required)]
    if any(not param.required for param in shown):
        usage.append("[OPTIONS]")
    panels: dict[str, list[str]] = {}
    for param in shown:
        kind = "Arguments" if param.param_type_name == "argument" else "Options"
        panel = getattr(param, "rich_help_panel", None) or kind
        panels.setdefault(panel, []).append(_row(param, hints[param.name]))
    tables = [
        f"| {title} | Default | Meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        for title, rows in panels.items()
    ]
    return "\n".join([f"### {name}\n", f"    {' '.join(usage)}\n", f"{_text(verb.help)}\n", *tables])


def _usage(param: Any, hint: Any) -> str:
    """Return a required parameter as it stands in the usage line."""
    value = _value(param, hint)
    return value if param.param_type_name == "argument" else f"{max(param.opts, key=len)} {value}"


def _row(param: Any, hint: Any) -> str:
    """Return the row of one parameter."""
    value = _value(param, hint)
    names = value if param.param_type_name == "argument" else ", ".join(param.opts)
    if param.secondary_opts:
        names += " / " + ", ".join(param.secondary_opts)
    if value and param.param_type_name != "argument":
        names += f" {value}"
    cells = f"`{names}`", _default(param), _text(param.help)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _text(help_text: str | None) -> str:
    """Return a help text as Markdown that shows `<` instead of taking it for HTML."""
    return (help_text or "").strip().replace("<", "&lt;")


def _value(param: Any, hint: Any) -> str:
    """Return what stands for the value: its metavar, its choices or the name of its type; empty for a switch."""
    if param.metavar:
        return str(param.metavar)
    if param.param_type_name == "argument":
        return str(param.name).upper()
    bare = _without_none(hint)
    many = typing.get_origin(bare) in (list, tuple)
    if many:
        bare = _without_none(typing.get_args(bare)[0])
    if bare is bool:
        return ""
    if typing.get_origin(bare) is typing.Literal:
        text = "|".join(str(choice) for choice in typing.get_args(bare))
    elif isinstance(bare, type) and issubclass(bare, enum.Enum):
        text = "|".join(str(choice.value) for choice in bare)
    else:
        text = {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(bare, "TEXT")
    return f"{text} …" if many else text


def _without_none(hint: Any) -> Any:
    """Return the type without `Annotated[…]` and without `| None`."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return rest[0] if len(rest) == 1 else str
    return hint


def _default(param: Any) -> str:
    """Return the default as one would type it; empty for a switch that is off and for an option left unset."""
    shown = getattr(param, "show_default", True)
    if isinstance(shown, str):
        return shown
    if param.required:
        return "required"
    value = param.default() if callable(param.default) else param.default
    if value is True and param.opts:
        return f"`{param.opts[0]}`"
    if value is None or value is False or value == "" or value == [] or value == ():
        return ""
    values = value if isinstance(value, list | tuple) else [value]
    return f"`{' '.join(str(v.value if isinstance(v, enum.Enum) else v) for v in values)}`"


def _first_sentence(text: str | None) -> str:
    """Return the first sentence of a help text on one line."""
    line = " ".join(_text(text).split())
    head, stop, _ = line.partition(". ")
    return head + stop.strip()


def write_or_check(page: Path, wanted: str, arguments: list[str], source: str) -> int:
    """Write a page made from `source`, or with --check compare it with what is wanted; return the exit code."""
    if arguments not in ([], ["--check"]):
        print(f"usage: python {sys.argv[0]} [--check]", file=sys.stderr)
        return 2
    if not arguments:
        page.write_text(wanted, encoding="utf-8")
        return 0
    found = page.read_text(encoding="utf-8") if page.exists() else ""
    if found == wanted:
        return 0
    name = f"docs/{page.name}"
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), name, "the code", "", "", 0, "")
    print("\n".join(list(lines)[:20]), file=sys.stderr)
    print(f"{name} differs from {source}; write it anew with `make commands`", file=sys.stderr)
    return 1


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with the code; return the exit code."""
    return write_or_check(PAGE, page(), arguments, "the command lines")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
