"""Parameters of a command line: made from the fields of a configuration or one by one, in groups that verbs share."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

from hierarchy_builder import __version__
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import MEANINGS, by_meaning, closest, sentences
from hierarchy_builder.files.paths import a_folder, a_path, a_place

REQUIRED = inspect.Parameter.empty


METAVARS = {
    str: "TEXT",
    int: "INTEGER",
    float: "NUMBER",
    list[str]: "TEXT",
    list[int]: "INTEGER",
    list[float]: "NUMBER",
}


class Parameter(NamedTuple):
    """An argument or option, as Typer reads it from the signature of a function."""

    hint: Any
    default: Any = REQUIRED


def argument(text: str, *, kind: Any = str, default: Any = REQUIRED, **settings: Any) -> Parameter:
    """An argument, which is required if it has no default. text: its help."""
    return Parameter(Annotated[kind, typer.Argument(help=text, **settings)], default)


def option(text: str, *declarations: str, kind: Any = str, default: Any = None, **settings: Any) -> Parameter:
    """An option. text: its help; declarations: how it is spelled if that does not follow from its name."""
    hint = kind | None if default is None else kind
    settings.setdefault("metavar", METAVARS.get(kind))
    return Parameter(Annotated[hint, typer.Option(*declarations, help=text, **settings)], default)


def switch(text: str, *declarations: str) -> Parameter:
    """An option without a value, off unless it is given."""
    return option(text, *declarations, kind=bool, default=False)


def flag(kind: type, name: str, *declarations: str, default: str | None = None) -> Parameter:
    """The option of a configuration field: its type, its sentence as help, its choices and its default.

    The value of an option that is not given is None, so that a config file or a stored result can decide. Lists are
    text, numbers separated by commas. default: what the help says of the default where the field's own is not used.
    """
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    hint = get_type_hints(kind)[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    inner = get_args(hint)[0] if NoneType in get_args(hint) else hint
    single = inner if inner in (int, float, bool) else str
    options = {each.name: f"`--{each.name.replace('_', '-')}`" for each in dataclasses.fields(kind)}
    text = re.sub(r"`(\w+)`", lambda word: options.get(word[1], word[0]), sentences(kind)[name])
    if field.default is not None:
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        words = [{True: "yes", False: "no"}[value] if single is bool else str(value) for value in values]
        text = f"{text} Default: {default or ','.join(words)}."
    if name in FILES:
        return option(text, *declarations, **PLACE | {"metavar": "PATH"})
    return option(text, *declarations, kind=single, **({"metavar": "|".join(choices)} if choices else {}))


def flags(kind: type, *names: str, **declared: str) -> dict[str, Parameter]:
    """The options of configuration fields by name; declared: fields whose spelling does not follow from the name."""
    found = {name: flag(kind, name) for name in names}
    return found | {name: flag(kind, name, spelled) for name, spelled in declared.items()}


def grouped(panel: str, **parameters: Parameter) -> dict[str, Parameter]:
    """The same options, under one heading of the help."""
    for each in parameters.values():
        for settings in get_args(each.hint)[1:]:
            if isinstance(settings, OptionInfo):
                settings.rich_help_panel = panel
    return parameters


FIRST = ("Arguments", "Options")
"""Headings of the help of a verb that come before its groups."""
NAME_COLUMNS = 24
"""Width of the names in a help; the text of a longer name begins on the next line."""


class Verb(TyperCommand):
    """A verb, whose help has its options in groups, with as much room for their texts as a narrow terminal has."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage line, without the braces that Typer puts around what is required."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Print arguments, options of no group, and then the groups."""
        rows = [(_group(param), _about(param, ctx)) for param in self.get_params(ctx)]
        _print_groups(formatter, sorted(rows, key=lambda row: row[0] not in FIRST))


class Verbs(TyperGroup):
    """A command line whose verbs are in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Print the options before a verb, and the verbs."""
        options = [(_group(param), _about(param, ctx)) for param in self.get_params(ctx)]
        verbs = [
            (getattr(verb, "rich_help_panel", "Verbs"), (name, (verb.help or "").split("\n\n")[0]))
            for name, verb in self.commands.items()
            if not verb.hidden
        ]
        _print_groups(formatter, verbs + options)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; an unknown option is refused with the one that means it, or with how fields are set."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # a class of click, which Typer may bring along itself
                raise
            raise UsageError(_about_option(error)) from None


class Program(typer.Typer):
    """A Typer whose commands are verbs."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """Declare a verb."""
        return super().command(name, cls=Verb, **settings)


def _group(param: Any) -> str:
    kind = "Arguments" if param.param_type_name == "argument" else "Options"
    return getattr(param, "rich_help_panel", None) or kind


def _about(param: Any, ctx: Any) -> tuple[str, str] | None:
    """Name and text of a parameter; an argument goes by its name alone, without the type that Typer adds."""
    record = param.get_help_record(ctx)
    if record is None or param.param_type_name != "argument":
        return record
    return record[0].split(" <")[0], record[1]


def _print_groups(formatter: Any, rows: Sequence[tuple[str, tuple[str, str] | None]]) -> None:
    """Write names and texts under the headings of their groups, all texts from the same column on.

    The formatter's own lists break at hyphens, which no option survives that is copied.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, row in rows:
        if row is not None:
            groups.setdefault(group, []).append(row)
    column = min(NAME_COLUMNS, max(len(name) for found in groups.values() for name, _ in found))
    room = max(formatter.width - column - 4, 10)
    for group, found in groups.items():
        formatter.write_paragraph()
        formatter.write_heading(group)
        for name, text in found:
            lines = textwrap.wrap(text, room, break_on_hyphens=False)
            if len(name) > column:
                formatter.write(f"  {name}\n")
                name = ""
            for line in lines or [""]:
                formatter.write(f"  {name:<{column}}  {line}".rstrip() + "\n")
                name = ""


def _about_option(error: Any) -> str:
    """The message about an unknown option of a verb."""
    verb = error.ctx.command
    options = [option for each in verb.params for option in (*each.opts, *each.secondary_opts)]
    names = {option.lstrip("-").replace("-", "_"): option for option in options if option.startswith("--")}
    asked = error.option_name.lstrip("-").replace("-", "_")
    start = f"{verb.name} has no option {error.option_name}"
    if "set" in names and by_meaning(asked, names) is None and by_meaning(asked, MEANINGS):
        return (
            f"{start}: fields are set by name, for example --set optim.lr=0.005; --dry-run prints all of them"
        )
    if (meant := closest(asked, names)) is not None:
        return f"{start}, did you mean {names[meant]}?"
    return f"{start}; `{error.ctx.command_path} --help` lists its options"


def new_app(name: str, text: str) -> typer.Typer:
    """A command line with the options that both programs have. text: its help."""
    app = Program(
        name=name,
        cls=Verbs,
        help=text,
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
        rich_markup_mode=None,
    )

    def shown(asked: bool) -> None:
        if asked:
            print(f"{name} {__version__}")
            raise typer.Exit

    settings = {"callback": shown, "is_eager": True}

    @app.callback(help=text)
    @takes(version=option("Print the version and stop.", "--version", kind=bool, default=False, **settings))
    def program(version: bool) -> None:
        """The options before a verb."""

    return app


def takes(**parameters: Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare the parameters of a verb; its function gets their values as keyword arguments."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        found = [
            inspect.Parameter(name, keyword, annotation=each.hint, default=each.default)
            for name, each in parameters.items()
        ]
        function.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
        return function

    return declare


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of an option whose UsageError names that option."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None

    parsed.__name__ = "path"
    return parsed


PATH: dict[str, Any] = {"kind": Path, "parser": checked(a_path), "metavar": "PATH"}
"""Settings of every argument and option that is a local path."""
FOLDER: dict[str, Any] = {"kind": Path, "parser": checked(a_folder), "metavar": "PATH|URL"}
"""Settings of those that are a folder to write to or to read from, here or at a URL."""
PLACE: dict[str, Any] = {"kind": str, "parser": checked(a_place), "metavar": "PATH|URL"}
"""Settings of every argument and option that is a local path or a URL."""
FILES = ("weights", "masks")
"""Fields of configurations that name local files or folders."""


AS_JSON = switch("Print JSON instead of a table.", "--json")
QUIET = switch("Print no progress and no configuration on stderr.", "--quiet", "-q")
OUTPUT = grouped("What it prints", as_json=AS_JSON, quiet=QUIET)
"""Options of every verb."""
