"""Sample keys: unique in the data set, and safe in tars, in webdataset and on every file system."""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from hierarchy_builder.errors import BuilderError

CLASS_CHARS, NAME_CHARS, HASH_CHARS = 40, 60, 8
SAFE_KEY = re.compile(r"[^./\\\x00-\x1f]+(/[^./\\\x00-\x1f]+)*")
"""Keys without dots, backslashes and control characters.

Such a key cannot lead outside its folder when a tar is unpacked, and webdataset takes the first dot as its end.
"""


def assign_keys(images: Iterable[tuple[str, str]]) -> list[str]:
    """Assign a unique key `<class>/<name>` to each (path, class name); paths must differ.

    Keys consist of [A-Za-z0-9_-] and one slash and have at most 110 characters; other characters are replaced. If that
    makes several keys equal, each of them gets a hash of its path, so that no key depends on the order of the listing.
    """
    pairs = list(images)
    plain = [f"{_safe(name, CLASS_CHARS)}/{_safe(_stem(path, name), NAME_CHARS)}" for path, name in pairs]
    counts = Counter(plain)
    taken = {key for key, count in counts.items() if count == 1}
    keys = []
    for (path, _), key in zip(pairs, plain, strict=True):
        if counts[key] > 1:
            key = next(
                k for k in (f"{key}-{_hash(path, n)}" for n in range(HASH_CHARS, 65)) if k not in taken
            )
            taken.add(key)
        keys.append(key)
    return keys


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
    parts = folders.split("/")
    composed = [unicodedata.normalize("NFC", part) for part in parts]
    if (own := unicodedata.normalize("NFC", class_name)) in composed:
        below = parts[composed.index(own) + 1 :]
        return "_".join([*below, name])
    return name


def _safe(text: str, limit: int) -> str:
    """Keep letters, digits, _ and -, and drop accents; a text too long or left empty gets a hash."""
    text = unicodedata.normalize("NFC", text)
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", "".join(letters))
    if not safe.strip("_"):
        return _hash(text, HASH_CHARS)
    return safe if len(safe) <= limit else f"{safe[: limit - HASH_CHARS - 1]}-{_hash(text, HASH_CHARS)}"


def _hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]
