"""Every reader of the trainer refuses mutated bytes with an error of its own, within bounded time and memory."""

from __future__ import annotations

import functools
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from fixture_shards import npy, write_shards
from mutations import read_mutated
from tiny_pipeline import tiny_pipeline, tiny_run

from hierarchy_builder.errors import UserError
from hierarchy_builder.files import parse_json, sealed_text
from hierarchy_builder.parsing import check_pickle, parse_npy, parse_npz, parse_yaml
from trainer.data.shards import _parse_index
from trainer.data.tars import OpenTar, ShardEntry
from trainer.data.tensor_files import read_tensors
from trainer.methods.trajectory_forcing.release import read_parts
from trainer.training import checkpoint as saved
from trainer.training.log import metrics_line, parse_metrics_line
from trainer.training.release_files import read_weights
from trainer.training.run_folder import read_config
from trainer.trajectories.trajectory import Trajectory

Example = tuple[list[bytes], Callable[[bytes], object]]
IN_SUITE, IN_DRILL = 200, 100_000


def on_disk(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of a file as one of bytes."""

    def call(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return call


def of_tar(path: Path) -> object:
    """All members of a tar."""
    tar = OpenTar(str(path), ShardEntry(name="a", num_samples=2, num_bytes=0, sha256=""))
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
    return [dict(part) if isinstance(part, dict) else part for _, part in read_parts(path)]


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


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    """By name of a reader: bytes it accepts, and the reader."""
    root = tmp_path_factory.mktemp("hostile")
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
        "tar": ([(shards / "train-000000.tar").read_bytes()], on_disk(root / "a.tar", of_tar)),
        "npy": ([array, npy(np.array(["x", "yz"]))], parse_npy),
        "npz": ([names.getvalue(), (shards / "statistics.npz").read_bytes()], parse_npz),
        "index": ([index], of_index),
        "class map": ([b'{"ant": 0, "bee": 1}'], functools.partial(of_class_map, json.loads(index))),
        "sealed JSON": ([sealed_text({"a": [1, 2.5], "b": {"c": "d"}})], parse_json),
        "safetensors": (
            [safetensors.torch.save(tensors, {"x": "y"})],
            on_disk(root / "a.safetensors", read_tensors),
        ),
        "msgpack": ([released()], on_disk(root / "checkpoint_3", of_release)),
        "trajectory": ([trajectory()], on_disk(root / "b.safetensors", Trajectory.load)),
        "YAML": ([config.encode(), b"a: &x [1]\nb: *x\n"], parse_yaml),
        "configuration": (
            [config.encode()],
            on_disk(root / "config.yaml", lambda path: read_config(path.parent)),
        ),
        "state": ([old.encode()], on_disk(root / saved.STATE, lambda path: saved.load_state(path.parent))),
        "metrics": ([row], parse_metrics_line),
        "pickles of torch": ([pt.getvalue(), legacy.getvalue()], on_disk(root / "a.pt", of_pt)),
    }


READERS = (
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
)


def expected_of(reader: str) -> tuple[type[Exception], ...]:
    """What a reader of files raises, or a function that turns bytes into data."""
    is_plain = reader in ("npy", "npz", "sealed JSON", "safetensors", "YAML")
    return (ValueError, OSError) if is_plain else (UserError,)


@pytest.mark.parametrize("reader", READERS)
def test_mutated_bytes_end_in_errors_of_our_own(examples: dict[str, Example], reader: str) -> None:
    given, read = examples[reader]
    assert all(read(data) is not None for data in given)
    refused = read_mutated(read, given, IN_SUITE, expected_of(reader))
    assert reader == "metrics" or refused > IN_SUITE // 4


@pytest.mark.drill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reader", READERS)
def test_a_hundred_thousand_mutated_inputs_of_each_reader(
    examples: dict[str, Example], reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given, read = examples[reader]
    refused = read_mutated(read, given, IN_DRILL, expected_of(reader), seed=1)
    with capsys.disabled():
        print(f"{reader}: {IN_DRILL:,} mutated inputs, {refused:,} refused, no other error")


NESTED = b"[" * 100_000
BOMB = b"a: &a [x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 115)
)


@pytest.mark.parametrize(
    ("read", "data", "said"),
    [
        (
            parse_npy,
            npy(np.ones(1)).replace(b"(1,)", b"(9" + b"9" * 15 + b",)").replace(b" " * 15, b"", 1),
            "follow",
        ),
        (parse_json, NESTED, "nested too deeply"),
        (parse_yaml, NESTED, "nested too deeply"),
        (parse_yaml, BOMB, "aliases expand to"),
        (parse_yaml, b"&a [*a]", "contains itself"),
        (parse_yaml, b"x" * (4 * 2**20 + 1), "bytes of YAML"),
    ],
)
def test_what_promises_more_than_it_holds_is_refused(
    read: Callable[[bytes], object], data: bytes, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read(data)


@pytest.mark.parametrize("size", [b"-0000001000", b"77777777777", b"\xff" * 12, b"\x80" + b"\x7f" * 11])
def test_a_tar_whose_sizes_lead_astray_is_refused(tmp_path: Path, size: bytes) -> None:
    folder = write_shards(tmp_path, num_samples=2)
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    for header in (0, 1024):  # tarfile checks the sum of a header, the quick reader does not need it
        data[header + 124 : header + 136] = size.ljust(12, b"\0")
        block = bytes(data[header : header + 148]) + b" " * 8 + bytes(data[header + 156 : header + 512])
        data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"the shard is damaged|samples, index"):
        of_tar(path)


@pytest.mark.parametrize(
    "changes", [{"url": "../../x.tar"}, {"url": "/x.tar"}, {"sha256": "../../../pwn"}, {"url": "s3://x"}]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, changes: dict[str, str]) -> None:
    content = json.loads((write_shards(tmp_path, num_samples=2) / "index.json").read_text())
    content["shardlist"][0] |= changes
    with pytest.raises(UserError, match="not a shard index"):
        of_index(json.dumps(content).encode())


class Running:
    """An object whose pickle would call a function."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("content", [{"a": Running()}, {"a": np.ones(2)}])
def test_a_pickle_of_more_than_tensors_is_refused_before_it_is_loaded(
    tmp_path: Path, content: dict[str, Any], is_zip: bool
) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"no part of a tensor|makes other objects"):
        check_pickle(tmp_path / "a.pt")


def test_networks_of_every_kind_of_tensor_pass(tmp_path: Path) -> None:
    kinds: Sequence[torch.dtype] = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
    content = {str(kind): torch.ones(3, dtype=kind) for kind in kinds}
    content |= dict(torch.nn.Linear(2, 3).state_dict()) | {"p": torch.nn.Parameter(torch.ones(2))}
    for is_zip in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        check_pickle(tmp_path / "a.pt")
        assert read_weights(tmp_path / "a.pt").keys() == content.keys()
