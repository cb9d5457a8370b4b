"""Which real images judge a run: held-out ones where there are any, and a sentence that says which they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.paths import filesystem_of
from hierarchy_builder.terminal import counted
from trainer.data.folders import Places, folders_at
from trainer.data.shards import ShardIndex, finished_folder, joined, open_index, pooled

HELD_OUT = ("val", "test")
"""How the names of splits that no run trains on begin, the first choice first."""
SAME_SHARDS = ("config_hash", "num_samples", "split")
"""What equal shards have in common, of what a run stores about those that trained it."""


def open_judges(places: Places, split: str | None = None) -> ShardIndex:
    """Open the shards that judge a run: those at a place, or those of a held-out split in a folder there.

    places: one or several, each with finished shards or their build, as `open_index` takes; or with folders named by
    their splits, for example `train` and `val`. split: the split to take; None takes one whose name begins with `val`,
    or else with `test`, or else the shards at the place themselves.
    Raises UsageError if that split is not there, and errors of `open_index`.
    """
    return joined(pooled(lambda url: _open_judge(url, split), folders_at(places)))


def _open_judge(url: str, split: str | None) -> ShardIndex:
    folders = _folders(url)
    if split is None:
        held_out = [name for start in HELD_OUT for name in folders if name.startswith(start)]
        places = (f"{url.rstrip('/')}/{name}" for name in held_out)
        return open_index(next((place for place in places if finished_folder(place)), url))
    if split in folders:
        return open_index(f"{url.rstrip('/')}/{split}")
    index = open_index(url)
    if index.split != split:
        raise UsageError(
            f"--split {split}: {url} holds shards of the split {index.split} and no folder {split}; give the folder "
            "of those shards, or leave out --split"
        )
    return index


def judged_on(trained: Mapping[str, Any], index: ShardIndex, num_real: int) -> str:
    """A sentence for people: how many images of which split judged a run, and whether it was trained on them.

    trained: what the run stores about its shards, see `ShardIndex.describe`.
    """
    images = f"{counted(num_real, 'image')} of split {index.split}"
    known = {each["sha256"] for each in trained.get("sets") or []}
    shared = sum(
        part.num_samples
        for part in index.parts
        if part.digest in known or all(trained.get(name) == getattr(part, name) for name in SAME_SHARDS)
    )
    if 0 < shared < index.num_samples:
        share = shared / index.num_samples
        shown = "less than 1%" if share < 0.01 else "more than 99%" if share > 0.99 else f"{share:.0%}"
        return f"Judged on {images}, of which {shown} trained this run: a network that only remembers them scores well."
    if not shared and any(trained.get(name) is None for name in SAME_SHARDS):
        return f"Judged on {images}; the run does not say which shards trained it."
    if shared or all(trained[name] == getattr(index, name) for name in SAME_SHARDS):
        return (
            f"Judged on the training images ({images}): a network that only remembers them scores well. Shards of "
            "other images, built with --split val, tell more."
        )
    return f"Judged on {images}, which are not the shards that trained this run."


def _folders(url: str) -> list[str]:
    """Names of the folders in a folder, sorted; none where the file system lists none."""
    try:
        filesystem, path = filesystem_of(url)
        entries = filesystem.ls(path, detail=True)
    except (ImportError, ValueError, OSError, NotImplementedError):
        return []
    return sorted(
        entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"
    )
