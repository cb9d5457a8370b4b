"""Sample keys: unique in the data set, and safe in tars, in webdataset and on every file system."""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hierarchy_builder.errors import BuilderError

CLASS_CHARS, NAME_CHARS, HASH_CHARS = 40, 60, 8
SAFE_KEY = re.compile(r"[^./\\\x00-\x1f]+(/[^./\\\x00-\x1f]+)*")
"""Keys without dots, backslashes and control characters.

Such a key cannot lead outside its folder when a tar is unpacked, and webdataset takes the first dot as its end.
"""
HASHED = re.compile(r"-[0-9a-f]{8,64}$")
"""How a key ends that got the hash of a path; other keys may end so too."""
UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


def plain_key(path: str, class_name: str) -> str:
    """The key `<class>/<name>` as far as it follows from path and class of one image; images may share it.

    It consists of [A-Za-z0-9_-] and one slash, and has at most 101 characters; other characters are replaced.
    """
    return f"{_safe_class(class_name)}/{_safe(_stem(path, class_name), NAME_CHARS)}"


def unique_keys(
    plain: pa.ChunkedArray, paths: pa.ChunkedArray, elsewhere: Iterable[str] = ()
) -> pa.ChunkedArray:
    """The keys of images with these plain keys and paths, which differ.

    Each of several images with equal plain keys gets a hash of its path, so that no key depends on the order of the
    listing. elsewhere: keys of images that are not among these and that no other image may get.
    """
    batches = pa.table({"key": plain}).to_batches(65_536)
    keys = (key for batch in batches for key in batch.column(0).to_pylist())
    hashes = np.fromiter(map(hash, keys), np.int64, len(plain))
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return plain  # known at a fraction of the memory of counting texts
    counts = plain.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    # Only keys that look like a key with a hash can be equal to one.
    taken = {
        *pc.filter(plain, pc.match_substring_regex(plain, HASHED.pattern)).to_pylist(),
        *elsewhere,
    } - {*repeated.to_pylist()}
    shared = pc.is_in(plain, value_set=repeated)
    named = []
    for key, path in zip(plain.filter(shared).to_pylist(), paths.filter(shared).to_pylist(), strict=True):
        key = next(k for k in (f"{key}-{_hash(path, n)}" for n in range(HASH_CHARS, 65)) if k not in taken)
        taken.add(key)
        named.append(key)
    mask = shared.combine_chunks()
    filled = pc.replace_with_mask(plain.combine_chunks(), mask, pa.array(named, plain.type))
    return pa.chunked_array([filled])


def check_key(key: str, where: str) -> str:
    """Return `key`; raise BuilderError if a file of that name could be written outside its folder."""
    if not SAFE_KEY.fullmatch(key):
        raise BuilderError(
            f"{where} has key {key!r}, expected <class>/<name> without dots or backslashes: rename it, or build the "
            "shards with hierarchy-builder, which assigns safe keys"
        )
    return key


def _stem(path: str, class_name: str) -> str:
    """The path below the first folder named like the class, or else the file name; both without extension."""
    folders, _, name = posixpath.splitext(path)[0].rpartition("/")
    own, parts = composed(class_name), composed(folders).split("/")
    below = folders.split("/")[parts.index(own) + 1 :] if own in parts else []
    return "_".join([*below, name])


def composed(text: str) -> str:
    """A name in which an accented letter is one character, as not every system writes it."""
    return unicodedata.normalize("NFC", text)


def _safe(text: str, limit: int) -> str:
    """Keep letters, digits, _ and -, and drop accents; a text too long or left empty gets a hash."""
    text = letters = composed(text)
    if not text.isascii():
        letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    safe = UNSAFE.sub("_", letters)
    if not safe.strip("_"):
        return _hash(text, HASH_CHARS)
    return safe if len(safe) <= limit else f"{safe[: limit - HASH_CHARS - 1]}-{_hash(text, HASH_CHARS)}"


@lru_cache(maxsize=65_536)
def _safe_class(name: str) -> str:
    return _safe(name, CLASS_CHARS)


def _hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]
