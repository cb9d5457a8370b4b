"""The run folder: its lock, its configuration, and the checks before a run is continued.

config.yaml     resolved configuration, and a description of the shards
checkpoints/    see `trainer.training.checkpoint`
metrics.jsonl   see `trainer.training.log`
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.fields import difference, identity, to_mapping
from hierarchy_builder.files.exclusion import BusyError, exclusive
from hierarchy_builder.files.untrusted.documents import parse_yaml, read_document
from hierarchy_builder.files.whole import guard, parse_json, refuse_links, write_bytes
from hierarchy_builder.terminal import counted, say
from trainer.data.shards import ShardIndex
from trainer.training import checkpoint as saved
from trainer.training.config import RunConfig, checked
from trainer.training.distributed import World
from trainer.training.log import truncate_metrics
from trainer.training.mirror import a_run, home_of, send

RunT = TypeVar("RunT", bound=RunConfig)

CONFIG = "config.yaml"
COMMENT = b"SHA-256 of the lines below"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Be the one writer of a run folder, see `exclusion`; TrainerError if there is another.

    A run that is kept at a URL is sent there at the end.
    """
    run.mkdir(parents=True, exist_ok=True)
    guard(run)
    with ExitStack() as held:
        try:
            for place in (run, home_of(run)):
                if place is not None:
                    held.enter_context(exclusive(place, say))
        except BusyError:
            raise TrainerError(
                f"{home_of(run) or run} is locked by another process that trains in it: wait for it, or choose "
                "another --out"
            ) from None
        refuse_links(run)
        yield
        send(run)


def find_origin(out: Path, resume: str, is_main: bool = True) -> Path | None:
    """Return the checkpoint to continue from, or None to start from scratch.

    The main rank names damaged checkpoints of another run that were skipped. Raises MismatchError or TrainerError if
    `out` has a later folder `step-*` that is not a complete checkpoint, because training would have to remove it.
    """
    if resume == "auto":
        return saved.checkpoint_to_resume(out)
    if resume == "never":
        if steps := saved.list_checkpoints(out):
            raise UsageError(
                f"{out} holds checkpoints up to {steps[-1].name}; choose another folder or --resume auto"
            )
        return None
    other = a_run(resume, is_new=True)  # nothing is written there
    if not other.exists():
        raise UsageError(
            f"--resume {resume}: found no such folder, expected auto, never or a run or checkpoint"
        )
    asked = saved.find_checkpoint(other)
    if asked.parent.resolve() == (out / "checkpoints").resolve():
        saved.later_checkpoints(out, saved.load_state(asked).step, asked)
        return asked
    # A command that started from another run may be repeated: it continues from its own checkpoints.
    return saved.checkpoint_to_resume(out) or saved.find_checkpoint(other, warn=is_main)


def settled(config: RunT, out: Path, origin: Path | None, device: torch.device | str) -> RunT:
    """Return the config with the precision that `auto` stands for: the recorded one, else that of the device.

    out: run folder. origin: the checkpoint to continue from, if any.
    """
    if config.precision != "auto":
        return config
    before: Any = {}
    if (out / CONFIG).exists():
        before = read_config(out)["config"]
    elif origin is not None:
        before = saved.load_state(origin).config
    found = before.get("precision", "auto")
    if found == "auto":  # also in an imported checkpoint, which nothing was trained from yet
        found = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return dataclasses.replace(config, precision=found)


def check_sets(index: ShardIndex, world: World) -> None:
    """Raise UsageError for sets of several splits, and MismatchError unless every process reads the same shards."""
    first, *others = index.parts
    for other in others:
        if other.split != first.split:
            raise UsageError(
                f"{first.url} is of split {first.split!r} and {other.url} of {other.split!r}: train on sets of one "
                "split, and let the others judge the run (`trainer report RUN`, `trainer evaluate`)"
            )
    digests = world.gather(torch.tensor(list(bytes.fromhex(index.digest)), device=world.device))
    if differing := (digests != digests[0]).any(dim=1).nonzero().flatten().tolist():
        raise MismatchError(
            f"this process reads {index.url} ({counted(index.num_samples, 'sample')}), and the shards of rank "
            f"{differing[0]} are not those of rank 0: name the same sets in every process, and let patterns match the "
            "same folders on every machine"
        )


def check_same_run(out: Path, origin: Path | None, config: Any, index: ShardIndex) -> None:
    """Raise MismatchError, listing the differing fields, if `out` or `origin` has other settings or shards."""
    wanted = _identity(config, index.describe())
    if (out / CONFIG).exists():
        before = read_config(out)
        _refuse_other_sets(out, before["shards"], index)
        _compare(str(out / CONFIG), before, wanted, type(config))
    if origin is not None:
        state = saved.load_state(origin)
        _refuse_other_sets(origin, state.shards, index)
        found = {"config": state.config, "shards": state.shards}
        _compare(str(origin), found, wanted, type(config))


def _refuse_other_sets(where: Path, shards: Mapping[str, Any], index: ShardIndex) -> None:
    """Raise MismatchError, naming what was added or is missing, if a run was trained on another list of sets."""
    known, now = shards.get("sets") or [], index.describe()["sets"]
    if len(known) < 2 and (len(now) < 2 or not known):
        return  # of one set, the configuration and the number of samples are compared
    added, missing = (
        [each for each in mine if each["sha256"] not in {other["sha256"] for other in others}]
        for mine, others in ((now, known), (known, now))
    )
    if added or missing:
        changes = [
            f"  {change}: {each['folder']} ({counted(each['num_samples'], 'sample')}, {each['sha256'][:12]}…)"
            for change, sets in (("added", added), ("missing", missing))
            for each in sets
        ]
        raise MismatchError(
            f"{where} was trained on {counted(len(known), 'set')} of shards, the command names {len(now)}; use the "
            "same sets or another folder, since the order of images is one over all sets\n"
            + "\n".join(changes)
        )


def read_config(run: Path) -> dict[str, Any]:
    """Read config.yaml of a run: the mappings `config`, its fields, and `shards`, a description of the data.

    Raises TrainerError if the file does not exist, MismatchError if it is damaged or is not from a run.
    """
    path = run / CONFIG
    try:
        content = parse_yaml(_without_checksum(read_document(path)))
    except FileNotFoundError:
        raise TrainerError(f"{run} is not a run folder of `trainer train`: found no {CONFIG}") from None
    except ValueError:
        content = None
    parts = (content.get("config"), content.get("shards")) if isinstance(content, dict) else ()
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise MismatchError(
            f"{path} is damaged or is not the configuration of a run: give another folder; or remove the file and "
            "repeat `trainer train` with the preset and settings of the run, which writes it again"
        )
    return content


def write_config(run: Path, content: Mapping[str, Any]) -> None:
    """Write config.yaml, the SHA-256 of its other lines in a comment before them."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).encode()
    write_bytes(run / CONFIG, _checksum_line(text) + text)


def _checksum_line(text: bytes) -> bytes:
    return b"# %s: %s\n" % (COMMENT, hashlib.sha256(text).hexdigest().encode())


def _without_checksum(data: bytes) -> bytes:
    """The lines after the comment. Raises ValueError for another comment; earlier releases wrote none."""
    if not data.startswith(b"#"):
        if COMMENT in data.partition(b"\n")[0]:
            raise ValueError("its first line is damaged")
        return data
    _, _, text = data.partition(b"\n")
    if data != _checksum_line(text) + text:
        raise ValueError("the lines do not have the SHA-256 in the first one")
    return text


def read_kept(path: Path) -> dict[str, Any]:
    """Read a JSON file in which `trainer evaluate` stores `metrics` of a run; without the file there are none.

    Raises TrainerError if the file is damaged.
    """
    if not path.exists():
        return {"metrics": []}
    try:
        content = parse_json(read_document(path))
        for row in content["metrics"]:
            row["name"], row["value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(
            f"{path} is damaged ({error!r}): remove it, `trainer evaluate` writes it again"
        ) from None
    return content


def _compare(where: str, found: dict[str, Any], wanted: dict[str, Any], kind: type) -> None:
    try:
        before = _identity(checked(kind, found["config"], where), found["shards"])
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{where} holds no configuration that this release can read ({error})") from None
    rows = [
        f"  {difference(name, before.get(name), wanted.get(name))}"
        for name in sorted(before.keys() | wanted.keys())
        if before.get(name) != wanted.get(name)
        and not (name.startswith("shards.") and before.get(name) is None)  # as in imported checkpoints
    ]
    if rows:
        raise MismatchError(
            "\n".join(
                [f"{where} was made with another configuration; use the same one or another folder", *rows]
            )
        )


def _identity(config: Any, shards: dict[str, Any]) -> dict[str, Any]:
    named = {f"shards.{name}": shards[name] for name in ("config_hash", "num_samples", "split")}
    named["shards.encoder"] = dict(shards["encoder"]).get("name")
    return {**identity(config), **named}


def prepare_folder(out: Path, config: Any, index: ShardIndex, step: int) -> None:
    """Write config.yaml and remove checkpoints and metrics after `step` from the folder."""
    saved.drop_after(out, step)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    content = {
        "config": to_mapping(config),
        "shards": index.describe(),
        "version": version("trajectory-hierarchies"),
    }
    write_config(out, content)
    truncate_metrics(out, step)
