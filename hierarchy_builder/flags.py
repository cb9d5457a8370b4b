"""Parameters of a command line: made from the fields of a configuration or one by one, in groups that verbs share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import typer

from hierarchy_builder.fields import sentences

REQUIRED = inspect.Parameter.empty


class Parameter(NamedTuple):
    """An argument or option, as Typer reads it from the signature of a function."""

    hint: Any
    default: Any = REQUIRED


def argument(text: str, *, kind: Any = str, **settings: Any) -> Parameter:
    """An argument, which is required. text: its help."""
    return Parameter(Annotated[kind, typer.Argument(help=text, **settings)])


def option(text: str, *declarations: str, kind: Any = str, default: Any = None, **settings: Any) -> Parameter:
    """An option. text: its help; declarations: how it is spelled if that does not follow from its name."""
    hint = kind | None if default is None else kind
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
    text = sentences(kind)[name]
    if field.default is not None and single is not bool:
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        text = f"{text} Default: {default or ','.join(map(str, values))}."
    return option(text, *declarations, kind=single, metavar="|".join(choices) or None)


def flags(kind: type, *names: str, **declared: str) -> dict[str, Parameter]:
    """The options of configuration fields by name; declared: fields whose spelling does not follow from the name."""
    found = {name: flag(kind, name) for name in names}
    return found | {name: flag(kind, name, spelled) for name, spelled in declared.items()}


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


def a_path(text: str) -> Path:
    """A path named on the command line; refuses the empty text of an unset variable, which Path takes for `.`."""
    if not text:
        raise typer.BadParameter("it is empty, expected a path; `.` is this folder")
    return Path(text)


PATH: dict[str, Any] = {"kind": Path, "parser": a_path, "metavar": "PATH"}
"""Settings that arguments and options share whose value is a path to be written."""


AS_JSON = switch("Print JSON instead of a table.", "--json")
QUIET = switch("Print no progress and no configuration on stderr.", "--quiet", "-q")
OUTPUT = {"as_json": AS_JSON, "quiet": QUIET}
