"""A published set is checked where it lies, by itself: what is damaged and what would deceive is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from command_line import cli
from fsspec.implementations.memory import MemoryFileSystem

from hierarchy_builder.build.publish import publish_to
from hierarchy_builder.errors import BuilderError, VerificationError
from hierarchy_builder.files.whole import fetched, write_sealed_json
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.shards import read_shard
from hierarchy_builder.verify.sets import find_set_problems


@pytest.fixture
def published(tiny_build: BuildFolder, tmp_path: Path) -> Path:
    publish_to(tiny_build, str(tmp_path / "set"), Reporter(quiet=True))
    return tmp_path / "set"


@pytest.fixture
def in_memory(tiny_build: BuildFolder) -> Iterator[str]:
    publish_to(tiny_build, "memory://published/set", Reporter(quiet=True))
    yield "memory://published/set"
    MemoryFileSystem.store.clear()


def test_a_whole_set_is_in_order_wherever_it_lies(published: Path, in_memory: str) -> None:
    done = cli("hierarchy-builder", "verify", published, in_memory)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [f"{place}: everything is in order" for place in (published, in_memory)]


def test_every_file_is_compared_with_what_vouches_for_it(published: Path) -> None:
    for path in sorted(published.iterdir()):
        data = path.read_bytes()
        for changed in (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
            None,
        ):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            found = list(find_set_problems(str(published)))
            assert any(path.name in text for text in found), (path.name, found)
        path.write_bytes(data)
    (published / "train-000009.tar").touch()
    done = cli("hierarchy-builder", "verify", published)
    assert (done.code, "train-000009.tar is not in index.json" in done.out) == (4, True)


def test_a_changed_tar_is_found_at_a_url(in_memory: str) -> None:
    fs, root = fsspec.core.url_to_fs(in_memory)
    data = bytearray(fs.cat_file(f"{root}/train-000001.tar"))
    data[-1] ^= 1
    fs.pipe_file(f"{root}/train-000001.tar", bytes(data))
    done = cli("hierarchy-builder", "verify", in_memory, "--json")
    assert done.code == 4
    assert [text.split(": ")[1] for text in done.json["problems"]] == [
        "train-000001.tar is not the tar of index.json, its SHA-256 differs"
    ]


def vouch_again(folder: Path) -> None:
    """Make every digest that of what is there, as somebody would who means harm."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shardlist"]:
        if (tar := folder / entry["url"]).is_file():
            entry |= {"filesize": tar.stat().st_size, "sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
            told = {"count": entry["nsamples"], "bytes": entry["filesize"], "sha256": entry["sha256"]}
            tar.with_suffix(".json").write_text(json.dumps({**told, "config_hash": index["config_hash"]}))
    (folder / "index.json").write_text(json.dumps(index))
    success = json.loads((folder / "_SUCCESS").read_text())
    success["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in success["files"]
    }
    success |= {"index_sha256": success["files"]["index.json"]}
    del success["document_sha256"]
    write_sealed_json(folder / "_SUCCESS", success)


def in_json(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return changed


def write_sparse(path: Path) -> None:
    """A tar whose only member has ten bytes and claims 10^13."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("class0/a.features.npy")
        info.size, info.pax_headers = 10, {"GNU.sparse.map": "0,10", "GNU.sparse.size": str(10**13)}
        tar.addfile(info, io.BytesIO(bytes(10)))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "outside": (
        in_json("index.json", lambda index: index["shardlist"][0].update(url="../../pwn-000000.tar")),
        "a tar called",
    ),
    "huge grid": (in_json("index.json", lambda index: index.update(grid=[10**9, 10**9])), "expected float16"),
    "no grid": (in_json("index.json", lambda index: index.update(grid=7)), "index.json is damaged"),
    "deep": (lambda folder: (folder / "class_map.json").write_text("[" * 10**5), "class_map.json is damaged"),
    "other classes": (in_json("class_map.json", lambda ids: ids.clear()), "no classes"),
    "sparse": (lambda folder: write_sparse(folder / "train-000000.tar"), "is not a file"),
    "fewer": (in_json("index.json", lambda index: index.update(num_samples=3)), "tells of 3 samples"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_vouches_for_itself_and_deceives_is_named(published: Path, name: str) -> None:
    change, said = HOSTILE[name]
    change(published)
    vouch_again(published)
    found = list(find_set_problems(str(published)))
    assert any(said in text for text in found), found


def test_a_pipe_in_place_of_a_tar_is_not_waited_for(published: Path) -> None:
    tar = published / "train-000000.tar"
    tar.unlink()
    os.mkfifo(tar)
    assert any(
        "train-000000.tar is missing, or no regular file" in text
        for text in find_set_problems(str(published))
    )
    with pytest.raises(VerificationError, match="no regular file"), fetched(tar):
        pass


def test_a_sparse_member_is_not_read(tmp_path: Path) -> None:
    write_sparse(tmp_path / "a.tar")
    with pytest.raises(BuilderError, match="is not a file"):
        list(read_shard(tmp_path / "a.tar"))


def test_nan_in_a_set_is_named(published: Path) -> None:
    data = bytearray((published / "train-000000.tar").read_bytes())
    start = data.index(b"\x93NUMPY") + 128
    data[start : start + 2] = np.float16("nan").tobytes()
    (published / "train-000000.tar").write_bytes(data)
    vouch_again(published)
    assert any("features are not finite" in text for text in find_set_problems(str(published)))
