"""Networks on the Hugging Face hub: a run's weights as a folder with a card, sent and fetched by huggingface_hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from hierarchy_builder.errors import TrainerError, UsageError

SCHEME = "hf://"
REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[\w.-]+)*)")
"""owner/name, a revision, and a folder inside."""
PICTURE = "samples.png"


def folder_of(name: str | Path) -> Path:
    """Return the local folder that `name` stands for; one on the hub is downloaded, into the cache of huggingface_hub.

    name: a folder, `hf://owner/name[@revision][/folder]`, or `owner/name` as a text where there is no folder `owner`.
    Raises UsageError for another form of URL and TrainerError where the hub has no such folder, or does not answer.
    """
    text = str(name)
    is_url = text.startswith(SCHEME)
    found = REPOSITORY.fullmatch(text.removeprefix(SCHEME))
    if not is_url and (isinstance(name, Path) or found is None or Path(text).parent.exists()):
        return Path(name)
    if found is None:
        raise UsageError(
            f"{text}: expected {SCHEME}owner/name, {SCHEME}owner/name@revision or a folder inside"
        )
    repository, revision, inside = found[1], found[2], found[3].strip("/")
    from huggingface_hub import snapshot_download

    patterns = [f"{inside}/*"] if inside else None
    local = _asked(
        lambda: snapshot_download(repository, revision=revision, allow_patterns=patterns),
        text if is_url else f"{text}: found no such folder here, and on the hub",
    )
    return Path(local) / inside


def push(write: Callable[[Path], object], repository: str, *, private: bool, token: str | None) -> str:
    """Send the folder that `write` makes to a repository of the hub, which is created if needed; return its address.

    Raises TrainerError where the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "model")
        hub = HfApi(token=token)

        def send() -> str:
            made = hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_folder(repo_id=made.repo_id, folder_path=Path(scratch) / "model")
            return str(made)

        return _asked(send, f"{SCHEME}{repository}")


def _asked(ask: Callable[[], str], what: str) -> str:
    """What the hub answers, or a TrainerError in one line."""
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return ask()
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TrainerError(
            f"{what}: {reason} Check the name and the connection; private repositories need `hf auth login`"
        ) from None


def card(pipe: Any, license: str, **facts: Any) -> str:
    """The card of a TrajectoryPipeline in Markdown, with the metadata that the hub reads.

    facts: the other variables of card.md.
    """
    names = [" ".join(pipe.class_name(label).split()).replace("|", "\\|") for label in pipe.classes]
    text = files("trainer.trajectories").joinpath("card.md").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return template.render(
        facts, pipe=pipe, license=json.dumps(license), names=names, first=repr(names[0]), picture=PICTURE
    )
