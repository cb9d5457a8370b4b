"""Frozen dataclasses whose fields are checked: plain data in and out, errors that name the field, and their hash.

Fields marked EXECUTION change how fast a result comes or what is reported with it, never the result. They stay out of
the identity that decides whether an existing output may be continued.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from hierarchy_builder.errors import UsageError, some
from hierarchy_builder.files.untrusted.documents import parse_yaml, read_document

ConfigT = TypeVar("ConfigT")
Entry = TypeVar("Entry")
STRICT = pydantic.ConfigDict(extra="forbid")
EXECUTION = {"execution": True}
CAME_LATER = {"came_later": True}
"""Marks a field that stays out of the identity at its default, so that outputs from before it can be continued."""

MOST = 1_000_000
"""Largest width, count of classes or tokens: a larger one is a mistake, or damage, and would take all memory."""
MOST_BLOCKS = 1000
"""Largest depth of a network."""
MOST_ROWS = 1024
"""Largest side of its grid."""


def from_mapping(kind: type[ConfigT], mapping: Mapping[str, Any], where: str = "configuration") -> ConfigT:
    """Build a checked configuration of one kind from plain data (YAML, JSON, flags), nested as its fields are.

    Raises UsageError naming `where`, each wrong field and, for an unknown field, the nearest known name.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(mapping))
    except pydantic.ValidationError as error:
        lines = [_explain(dict(problem), known_fields(kind)) for problem in error.errors()]
        raise UsageError(f"{where}: " + "; ".join(lines)) from None


def fields_of_file(path: Path) -> dict[str, Any]:
    """The fields in a config file (YAML), by name. Raises UsageError, which names the file."""
    try:
        content = parse_yaml(read_document(path)) or {}
    except (OSError, ValueError) as error:
        raise UsageError(f"config file {path}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"config file {path}: found {type(content).__name__}, expected fields by name")
    return content


def to_mapping(config: Any) -> dict[str, Any]:
    """All fields as plain data, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def identity(config: Any) -> dict[str, Any]:
    """The fields that decide the result, by name, those of nested configurations by dotted name.

    Left out are fields marked EXECUTION, and those marked CAME_LATER that have their default.
    """
    values, found = to_mapping(config), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("execution") or (field.metadata.get("came_later") and value == field.default):
            continue
        if dataclasses.is_dataclass(value):
            found.update({f"{field.name}.{inner}": v for inner, v in values[field.name].items()})
        else:
            found[field.name] = values[field.name]
    return found


def brief(value: Any) -> str:
    """One line for a dataclass: what differs from its defaults; arrays by type and shape, long values by their length.

    A class takes it as its `__repr__`.
    """
    shown = []
    for each in dataclasses.fields(value):
        given = getattr(value, each.name)
        default = each.default_factory() if callable(each.default_factory) else each.default
        if each.repr and (hasattr(given, "shape") or given != default):
            shown.append(f"{each.name}={_in_short(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def _in_short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {list(value.shape)}" if len(value.shape) else f"{value:.4g}"
    text = brief(value) if dataclasses.is_dataclass(value) else repr(value)
    if len(text) <= 80 or dataclasses.is_dataclass(value):
        return text
    is_sized = isinstance(value, Mapping | list | tuple | set)
    return f"<{type(value).__name__} of {len(value):,}>" if is_sized else f"{text[:77]}…"


def config_hash(mapping: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of `mapping`, as 64 hex digits."""
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def known_fields(kind: Any) -> list[str]:
    """Every field of a kind of configuration, those of nested configurations by dotted name."""
    fields = dataclasses.fields(kind)
    nested: dict[str, Any] = {
        field.name: field.default_factory
        for field in fields
        if dataclasses.is_dataclass(field.default_factory)
    }
    names = [field.name for field in fields if field.name not in nested]
    return names + [
        f"{outer}.{field.name}" for outer, cls in nested.items() for field in dataclasses.fields(cls)
    ]


def flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings inside become dotted names, one level deep."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


MEANINGS = {
    "lr": "learning_rate learningrate step_size",
    "total_images": "epochs num_epochs max_epochs steps num_steps max_steps iterations num_images images",
    "batch_size": "batch bs global_batch_size train_batch_size",
    "micro_batch_size": "grad_accum gradient_accumulation gradient_accumulation_steps accumulate_grad_batches",
    "loader_workers": "workers num_workers dataloader_workers",
    "width": "dim hidden hidden_dim hidden_size embed_dim channels d_model",
    "depth": "layers num_layers blocks num_blocks n_layers",
    "num_heads": "heads n_heads attention_heads",
    "num_classes": "classes n_classes",
    "ema_halflives_kimg": "ema ema_decay ema_rate ema_beta",
    "precision": "dtype amp mixed_precision fp16 bf16 half",
    "checkpoint_images": "save_every save_interval save_steps checkpoint_every checkpoint_steps",
    "log_images": "log_every log_interval logging_steps log_steps",
    "keep_checkpoints": "save_total_limit max_checkpoints",
    "warmup_images": "warmup warmup_steps warmup_epochs",
    "label_dropout": "class_dropout class_dropout_prob cfg_dropout cond_drop_prob",
    "guidance": "cfg guidance_scale cfg_scale",
    "wandb_project": "wandb project",
    "max_seconds": "max_time time_limit",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing checkpointing",
    "cuts": "thresholds heights levels",
    "image_px": "image_size resolution size",
    "samples_per_shard": "maxcount shard_size",
}
"""Fields by other names for the same thing, as other libraries spell them."""


def by_meaning(name: str, known: Iterable[str]) -> str | None:
    """The known field, perhaps of a nested configuration, that means what `name` means elsewhere."""
    asked = name.rpartition(".")[2].casefold().replace("-", "_")
    meant = next((field for field, others in MEANINGS.items() if asked in others.split()), asked)
    found = [each for each in known if each.rpartition(".")[2].casefold() == meant]
    return found[0] if len(found) == 1 else None


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name that means what `name` means elsewhere, or that is spelled almost like it."""
    if (meant := by_meaning(name, known)) is not None:
        return meant
    by_fold = {each.casefold(): each for each in known}
    found = difflib.get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.5)
    return by_fold[found[0]] if found else None


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: `did you mean 'x'?`, or known names (at most 20) if none is close."""
    if (found := closest(name, known)) is not None:
        return f"did you mean {found!r}?"
    return f"known are {some(list(known), 20)}"


def named(entries: Mapping[str, Entry], name: str, what: str) -> Entry:
    """The entry called `name`. Raises UsageError, which names the nearest, where there is no such `what`."""
    if name not in entries:
        raise UsageError(f"unknown {what} {name!r}, {nearest(name, entries)}")
    return entries[name]


SHOWN_CHARACTERS = 70
"""A value of a configuration that is longer is shortened where two are compared."""


BEFORE_DIFFERENCE = 20
"""Characters of two long texts that are shown before the first that differs."""


def difference(name: str, before: Any, now: Any, places: tuple[str, str] = ("there", "now")) -> str:
    """One line about a field that differs: both values, or of long ones the first place where they differ."""
    texts = [each if len(each) <= SHOWN_CHARACTERS else "" for each in (repr(before), repr(now))]
    if all(texts):
        return f"{name}: {texts[0]} {places[0]}, {texts[1]} {places[1]}"
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        first = next(key for key in [*before, *now] if key not in before or before[key] != now.get(key, ...))
        return difference(f"{name}.{first}", before.get(first), now.get(first), places)
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        if len(before) != len(now):
            return f"{name}: {len(before):,} values {places[0]}, {len(now):,} values {places[1]}"
        for place, (a, b) in enumerate(zip(before, now, strict=True)):
            if a != b:
                return difference(f"{name}[{place}]", a, b, places)
    if isinstance(before, str) and isinstance(now, str):  # paths, of which the ends differ
        same = len(os.path.commonprefix([before, now])[:-BEFORE_DIFFERENCE])  # noqa: RUF071 (of any text)
        before, now = (f"…{each[same : same + SHOWN_CHARACTERS]}" if same else each for each in (before, now))
    shown = [text or _shortly(value) for text, value in zip(texts, (before, now), strict=True)]
    return f"{name}: {shown[0]} {places[0]}, {shown[1]} {places[1]}"


def _shortly(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{len(value):,} fields ({', '.join(map(str, list(value)[:4]))}{', …' * (len(value) > 4)})"
    if isinstance(value, list | tuple):
        return f"{len(value):,} values"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS + 3 else f"{text[:SHOWN_CHARACTERS]}…"


def require(condition: bool, message: str) -> None:
    """Refuse a value of a configuration; `from_mapping` names the field and the file."""
    if not condition:
        raise ValueError(message)


def require_size(name: str, value: float, most: int = MOST) -> None:
    """Refuse a size of a network that is not above 0, or larger than any network has."""
    require(0 < value <= most, f"{name} is {value}, expected above 0 and at most {most:,}")


class CheckedFields:
    """Base of configurations: unknown fields are refused, `brief` shows them, and each check names the wrong field."""

    __slots__ = ()
    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    def __init_subclass__(cls) -> None:
        cls.__repr__ = brief  # type: ignore[method-assign]  # in the class itself, or `dataclass` makes another

    def check_shares(self, *names: str) -> None:
        """Refuse fields that are not between 0 and 1."""
        for name in names:
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}, expected a share from 0 to 1")

    def check_above_zero(self, *names: str) -> None:
        """Refuse fields that are not finite numbers above 0; None is accepted."""
        for name in names:
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} is {value}, expected above 0, and finite")

    def check_least(self, least: int, *names: str) -> None:
        """Refuse fields below `least`; None is accepted."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= least, f"{name} is {value}, expected {least} or more")

    def check_between(self, least: float, most: float, *names: str) -> None:
        """Refuse fields below `least` or above `most`; None is accepted."""
        for name in names:
            value = getattr(self, name)
            require(value is None or least <= value <= most, f"{name} is {value}, expected {least} to {most}")

    def check_finite(self, *names: str) -> None:
        """Refuse fields that are infinite or NaN."""
        for name in names:
            value = getattr(self, name)
            require(math.isfinite(value), f"{name} is {value}, expected a finite number")


def _explain(problem: dict[str, Any], known: list[str]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown field {name!r}, {nearest(name, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


@functools.cache
def sentences(kind: type) -> dict[str, str]:
    """The text below each field of a configuration, its base classes included, as one line by the field's name."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for node, below in itertools.pairwise(tree.body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[node.target.id] = " ".join(str(below.value.value).split())
    return found
