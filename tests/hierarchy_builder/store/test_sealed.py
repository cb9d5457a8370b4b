"""A sealed JSON document: every changed bit is found, and documents without a seal are read where that is allowed."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from hierarchy_builder.errors import UserError
from hierarchy_builder.files.whole import (
    parse_json,
    read_json,
    sealed_text,
    sha256_file,
    write_json,
    write_sealed_json,
)
from hierarchy_builder.store.shard_set import write_success

CONTENT = {"zebra": [1, 2.5, None], "name": "é \u2028", "below": {"document": "x"}}


@pytest.mark.parametrize("sort_keys", [True, False])
def test_a_sealed_document_is_read_and_every_flipped_bit_is_found(sort_keys: bool) -> None:
    text = sealed_text(CONTENT, sort_keys=sort_keys)
    assert parse_json(text, sealed=True) == CONTENT
    for number in range(8 * len(text)):
        changed = bytearray(text)
        changed[number // 8] ^= 1 << number % 8
        with pytest.raises(ValueError):
            parse_json(bytes(changed), sealed=True)


def test_anybody_can_compute_the_seal(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", CONTENT)
    text = (tmp_path / "a.json").read_text()
    seal = json.loads(text)["document_sha256"]
    assert hashlib.sha256(re.sub(seal, "0" * 64, text).encode()).hexdigest() == seal


def test_a_missing_seal_is_damage_only_where_one_is_expected(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", CONTENT)
    assert read_json(tmp_path / "a.json") == CONTENT
    with pytest.raises(UserError, match=r"a\.json is damaged .*checksum"):
        read_json(tmp_path / "a.json", sealed=True)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"3", b""])
def test_text_that_is_no_object_is_one_kind_of_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_the_last_marker_of_a_set_vouches_for_the_files_beside_it(tmp_path: Path) -> None:
    for name in ("index.json", "class_map.json"):
        write_json(tmp_path / name, {"name": name})
    index = sha256_file(tmp_path / "index.json")
    write_json(tmp_path / "_SUCCESS", {"count": 3, "index_sha256": index})
    before = (tmp_path / "_SUCCESS").read_bytes()
    write_success(tmp_path, 3)  # a true marker of an earlier release stays as it is
    assert (tmp_path / "_SUCCESS").read_bytes() == before
    write_json(tmp_path / "index.json", {"name": "other"})
    write_success(tmp_path, 3)
    found = read_json(tmp_path / "_SUCCESS", sealed=True)
    digests = {name: sha256_file(tmp_path / name) for name in ("index.json", "class_map.json")}
    assert found == {"count": 3, "index_sha256": digests["index.json"], "files": digests}
