"""Every reader of both packages gets bytes that were changed at random, and must refuse them in an error of ours.

    python tests/drills/hostile_readers.py [--inputs 100000] [--readers tar npy …] [--record]

prints for each reader how many inputs it read and refused. Any other error, more than `mutations.SECONDS` for an input,
or more memory than `mutations.MEMORY_KIB` ends the run.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import safetensors.torch
import torch
import yaml

from hierarchy_builder.errors import UserError, VerificationError
from hierarchy_builder.files.untrusted.arrays import parse_npy, parse_npz
from hierarchy_builder.files.untrusted.documents import parse_yaml
from hierarchy_builder.files.whole import parse_json, sealed_text
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.ledger import check_manifest, read_marker
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.store.statistics import read_part_moments
from hierarchy_builder.store.units import layout_of
from hierarchy_builder.vocabulary.prototypes import load_vocabulary
from trainer.data.shards import _parse_index
from trainer.data.tars import OpenTar, ShardEntry
from trainer.data.tensor_files import read_tensors
from trainer.methods.trajectory_forcing.release import read_parts
from trainer.training import checkpoint as saved
from trainer.training.log import metrics_line, parse_metrics_line
from trainer.training.release_files import read_weights
from trainer.training.run_folder import read_config
from trainer.trajectories.trajectory import Trajectory

sys.path.extend(str(Path(__file__).resolve().parents[2] / part) for part in (".", "tests/support"))
from build_flips import make_builds
from fixture_shards import npy, write_shards
from mutations import read_mutated
from tiny_pipeline import tiny_pipeline, tiny_run

from benchmarks import records

PLAIN = (ValueError, OSError)
"""What a function raises that turns bytes into data and knows no name of a file."""


class Reader(NamedTuple):
    """Bytes that a reader accepts, how it reads them, and what it may raise for others."""

    examples: list[bytes]
    read: Callable[[bytes], object]
    expected: tuple[type[Exception], ...] = (UserError,)


def on_disk(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of a file as one of bytes."""

    def call(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return call


def of_tar(path: Path) -> object:
    """All members of a tar."""
    tar = OpenTar(str(path), ShardEntry(name="a", num_samples=2, num_bytes=0, sha256="", folder=""))
    return [tar.read(*place) for _, members in tar.samples for place in members.values()]


def of_index(data: bytes) -> object:
    return _parse_index("shards", of_json(data), {"ant": 0, "bee": 1, "cat": 2}, {})


def of_json(data: bytes) -> dict[str, Any]:
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(str(error)) from None


def of_class_map(index: dict[str, Any], data: bytes) -> object:
    return _parse_index("shards", index, of_json(data), {})


def of_release(path: Path) -> object:
    return [dict(part) if isinstance(part, dict) else part for _, part in read_parts(path, lambda name: True)]


def of_pt(path: Path) -> object:
    with warnings.catch_warnings(action="ignore"):
        return read_weights(path)


def released() -> bytes:
    """A checkpoint of the release with two small arrays."""
    array = msgpack.ExtType(1, msgpack.packb(((2, 2), "float32", np.ones((2, 2), np.float32).tobytes())))
    return msgpack.packb({"step": 3, "params": {"net": {"a": array}}, "ema_params": {"500": {"a": array}}})


def trajectory() -> bytes:
    """A file of the format before the seal, so that changes reach the reader itself."""
    drawn = tiny_pipeline()(0, 0)
    entries = (
        "label",
        "class_name",
        "num_steps",
        "guidance",
        "weak_scale",
        "encoder",
        "origin",
        "model",
        "history",
    )
    text = {name: json.dumps(getattr(drawn, name)) for name in entries}
    tensors = {"levels": drawn.levels, "seeds": torch.tensor(drawn.seeds)}
    return safetensors.torch.save(tensors, {"format_version": "1", **text})


def of_trainer(root: Path) -> dict[str, Reader]:
    """Readers of the trainer by name. root: a folder for the files they read."""
    shards = write_shards(root / "shards", num_samples=2)
    run = tiny_run(root / "run")
    state = json.loads((saved.find_checkpoint(run) / saved.STATE).read_text())
    index = (shards / "index.json").read_bytes()
    array, names = npy(np.ones((2, 3), np.float16)), io.BytesIO()
    np.savez(names, a=np.ones(3), b=np.arange(4))
    tensors = {"a": torch.ones(2, 3), "b": torch.arange(3)}
    pt, legacy = io.BytesIO(), io.BytesIO()
    torch.save(tensors, pt)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    config = yaml.safe_dump({"config": {"seed": 0, "model": {"grid": [4, 4]}}, "shards": {"split": "train"}})
    old = json.dumps(
        {**{k: v for k, v in state.items() if k != "document_sha256"}, "format_version": 1, "files": {}}
    )
    row = metrics_line({"step": 3, "loss": 0.5, "images": 24}).rstrip()
    return {
        "tar": Reader([(shards / "train-000000.tar").read_bytes()], on_disk(root / "a.tar", of_tar)),
        "npy": Reader([array, npy(np.array(["x", "yz"]))], parse_npy, PLAIN),
        "npz": Reader([names.getvalue(), (shards / "statistics.npz").read_bytes()], parse_npz, PLAIN),
        "index": Reader([index], of_index),
        "class map": Reader([b'{"ant": 0, "bee": 1}'], functools.partial(of_class_map, json.loads(index))),
        "sealed JSON": Reader([sealed_text({"a": [1, 2.5], "b": {"c": "d"}})], parse_json, PLAIN),
        "safetensors": Reader(
            [safetensors.torch.save(tensors, {"x": "y"})],
            on_disk(root / "a.safetensors", read_tensors),
            PLAIN,
        ),
        "msgpack": Reader([released()], on_disk(root / "checkpoint_3", of_release)),
        "trajectory": Reader([trajectory()], on_disk(root / "b.safetensors", Trajectory.load)),
        "YAML": Reader([config.encode(), b"a: &x [1]\nb: *x\n"], parse_yaml, PLAIN),
        "configuration": Reader(
            [config.encode()],
            on_disk(root / "config.yaml", lambda path: read_config(path.parent)),
        ),
        "state": Reader(
            [old.encode()], on_disk(root / saved.STATE, lambda path: saved.load_state(path.parent))
        ),
        "metrics": Reader([row], lambda line: told(parse_metrics_line(line) is None)),
        "pickles of torch": Reader([pt.getvalue(), legacy.getvalue()], on_disk(root / "a.pt", of_pt)),
    }


def told(damage: object) -> bool:
    """Refuse what a reader that does not raise tells of as damage; True for none."""
    if damage:
        raise VerificationError(str(damage))
    return True


def of_build(path: Path, read: Callable[[], object]) -> Reader:
    """A reader of one file of a build, which stays changed."""
    return Reader([path.read_bytes()], on_disk(path, lambda _: read()))


def of_builder(root: Path) -> dict[str, Reader]:
    """Readers of the builder by name. root: where a staged and a fused build are made."""
    folder, fused = make_builds(root)
    features, layout = layout_of(folder, "extract")
    name = "block_mean"
    described, chunk = features / name / "zarr.json", stores.shard_file(features, name, 0)
    copies = {path: path.read_bytes() for path in (described, chunk)}

    def layout_of_array() -> object:
        return told(stores.damaged_layout(features, {name: layout[name]}))

    def rows() -> object:
        described.write_bytes(copies[described])  # another reader changes it
        return stores.read_rows(stores.open_store(features), name, slice(0, 1))

    tar, marker = folder.shards / "train-000001.tar", folder.markers("extract")[0]
    return {
        "parquet": of_build(folder.listing, lambda: read_index(folder.listing)),
        "marker": of_build(marker, lambda: read_marker(marker)),
        "manifest": of_build(folder.manifest_copy, lambda: check_manifest(folder.manifest_copy)),
        "zarr metadata": of_build(described, layout_of_array),
        "zarr chunk": of_build(chunk, rows),
        "vocabulary": of_build(folder.vocabulary, lambda: load_vocabulary(folder.vocabulary)),
        "part of a fused build": of_build(fused.part_moments(0), lambda: read_part_moments(fused, 0, {})),
        "tar, read whole": of_build(tar, lambda: list(read_shard(tar))),
    }


def all_readers(root: Path) -> dict[str, Reader]:
    """Readers of both packages by name."""
    for name in ("builder", "trainer"):
        (root / name).mkdir()
    return {**of_trainer(root / "trainer"), **of_builder(root / "builder")}


NAMES = (
    *(
        "tar",
        "npy",
        "npz",
        "index",
        "class map",
        "sealed JSON",
        "safetensors",
        "msgpack",
        "trajectory",
        "YAML",
    ),
    *("configuration", "state", "metrics", "pickles of torch"),
    *("parquet", "marker", "manifest", "zarr metadata", "zarr chunk", "vocabulary", "part of a fused build"),
    "tar, read whole",
)


def make_parser() -> argparse.ArgumentParser:
    """The options of the drill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="Inputs for each reader.")
    parser.add_argument("--readers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    records.add_option(parser)
    return parser


def main() -> None:
    """Read, and print the counts."""
    asked = make_parser().parse_args()
    rows = list[list[str]]()
    with tempfile.TemporaryDirectory(prefix="readers-") as place:
        readers = all_readers(Path(place))
        for name in asked.readers:
            reader, started = readers[name], time.perf_counter()
            refused = read_mutated(reader.read, reader.examples, asked.inputs, reader.expected, asked.seed)
            rows.append([name, f"{asked.inputs:,}", f"{refused:,}", "0"])
            print(*rows[-1], f"{time.perf_counter() - started:.0f} s", sep="\t", flush=True)
    columns = ["reader", "mutated inputs", "refused", "other errors"]
    records.write(asked.record, columns=columns, rows=rows, seeds=[asked.seed])


if __name__ == "__main__":
    main()
