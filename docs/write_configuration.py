"""Write docs/configuration.md, the reference of every field of both packages, from the configurations themselves.

python docs/write_configuration.py            writes the page
python docs/write_configuration.py --check    writes nothing; exit code 1 where the page differs from the code
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from write_commands import write_or_check

from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.fields import sentences
from trainer.decode.config import DecoderConfig
from trainer.methods.registry import METHODS, all_presets, method_of
from trainer.training.config import MethodRunConfig, PostTrainingConfig

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

<!-- Written by docs/write_configuration.py (`make commands`). Edit the docstrings in the code instead of this page. -->

This page lists every field that can be configured, with its type, its default and its meaning. An unknown field, or a
value that does not fit, ends a command with exit code 2 and a message that names the field.

- `hierarchy-builder … --config FILE` reads a YAML file with the sections below. Options of the command override it.
- `trainer … --config FILE` reads a YAML file of fields, nested as their dotted names say (`optim: {lr: 0.005}`), and
  `--set NAME=VALUE` sets one field by its dotted name. Order of precedence: options, `--set`, the file, the preset.
- `--dry-run` of a training verb prints all fields as they would be used and stops.
- "preset" as a default means that the presets of the method differ; `trainer presets --json` prints the values of each.

Fields marked *execution* change how fast a result comes or what is reported with it, never the result: an existing
build or run can be continued with other values of them.
"""
BUILDER = {
    "extract": ExtractConfig,
    "hierarchy": HierarchyRecipe,
    "vocabulary": VocabularyConfig,
    "shard": ShardConfig,
}


def page() -> str:
    """Return the whole text of docs/configuration.md."""
    parts = [INTRODUCTION, "## hierarchy-builder\n"]
    for section, kind in BUILDER.items():
        parts += [f"### Section `{section}`\n", _table(kind, _defaults(kind))]
    shared = {field.name for field in dataclasses.fields(MethodRunConfig)} - {"post_training"}
    parts += [
        "## trainer\n",
        "### Fields of every method\n",
        _table(MethodRunConfig, _common(shared), only=shared),
    ]
    for name, method in METHODS.items():
        configs = [config for make in all_presets().values() if method_of(config := make()) is method]
        kind = type(configs[0])
        own = {field.name for field in dataclasses.fields(kind)} - shared - {"post_training", "method_name"}
        sections = {field for field in own if dataclasses.is_dataclass(getattr(configs[0], field))}
        parts.append(f"### {name}\n")
        if plain := own - sections:
            parts.append(_table(kind, _values(configs, plain), only=plain))
        for section in (field.name for field in dataclasses.fields(kind) if field.name in sections):
            nested = [getattr(config, section) for config in configs]
            parts.append(_table(type(nested[0]), _values(nested), prefix=f"{section}."))
    parts += [
        "### Post-training\n",
        "Fields of `trainer post-train`, with or without `post_training.` before the name.\n",
        _table(PostTrainingConfig, _defaults(PostTrainingConfig)),
        "### Decoder\n",
        "Fields of `trainer train-decoder`. Those named as fields of every method mean the same.\n",
        _table(DecoderConfig, _defaults(DecoderConfig)),
    ]
    return "\n".join(parts)


def _table(kind: Any, defaults: Mapping[str, str], *, only: set[str] | None = None, prefix: str = "") -> str:
    """One row for each field of a configuration, those of configurations inside it by dotted name."""
    texts, hints = sentences(kind), typing.get_type_hints(kind)
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if only is not None and field.name not in only:
            continue
        if dataclasses.is_dataclass(field.default_factory):
            inner: Any = field.default_factory
            rows += _table(inner, _defaults(inner), prefix=f"{prefix}{field.name}.").splitlines()[2:]
            continue
        text = texts.get(field.name, "") + (" *execution*" if field.metadata.get("execution") else "")
        cells = (
            f"`{prefix}{field.name}`",
            _type(hints[field.name]),
            defaults.get(field.name, ""),
            text.strip(),
        )
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _defaults(kind: Any) -> dict[str, str]:
    """The default of each field of a configuration that does not depend on a preset."""
    return {
        field.name: "required" if field.default is dataclasses.MISSING else _shown(field.default)
        for field in dataclasses.fields(kind)
        if field.default_factory is dataclasses.MISSING
    }


def _common(names: set[str]) -> dict[str, str]:
    """The value of each field in all presets of all methods, or `preset`."""
    return _values([make() for make in all_presets().values()], names)


def _values(configs: list[Any], names: set[str] | None = None) -> dict[str, str]:
    """The value of each field if the configurations agree, else `preset`."""
    found = {}
    for field in dataclasses.fields(configs[0]):
        if names is None or field.name in names:
            values = {_shown(getattr(config, field.name)) for config in configs}
            found[field.name] = values.pop() if len(values) == 1 else "preset"
    return found


def _shown(value: Any) -> str:
    """A value as YAML takes it."""
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else '`""`'


def _type(hint: Any) -> str:
    """A type in words, or its choices."""
    if typing.get_origin(hint) is typing.Annotated:
        return _type(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list):
        inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
        return f"list of {_type(inner[0])}" if inner else "list"
    if typing.get_origin(hint) is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with the code; return the exit code."""
    return write_or_check(PAGE, page(), arguments, "the configurations")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
