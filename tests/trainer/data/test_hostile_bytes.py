"""Every reader of both packages refuses mutated bytes with an error of its own, within bounded time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture_shards import npy, write_shards
from hostile_readers import NAMES, Reader, all_readers, of_index, of_tar
from mutations import read_mutated

from hierarchy_builder.errors import UserError
from hierarchy_builder.files.untrusted.arrays import parse_npy
from hierarchy_builder.files.untrusted.documents import parse_yaml
from hierarchy_builder.files.untrusted.pickles import check_pickle
from hierarchy_builder.files.whole import parse_json
from trainer.training.release_files import read_weights

INPUTS = 150
"""Of each reader; `make drill` reads 100,000."""
TOLERANT = ("part of a fused build",)
"""Readers that a checksum beside the file helps in a build."""


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return all_readers(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", NAMES)
def test_mutated_bytes_end_in_errors_of_our_own(readers: dict[str, Reader], name: str) -> None:
    examples, read, expected = readers[name]
    assert all(read(data) is not None for data in examples)
    refused = read_mutated(read, examples, INPUTS, expected)
    assert name in TOLERANT or refused > INPUTS // 4


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
