"""Names of samples: unique in the data set, safe in a tar, for webdataset and on every file system."""

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
"""Names below one folder whatever unpacks them, which end where the name of a member begins: without dots."""


def assign_keys(images: Iterable[tuple[str, str]]) -> list[str]:
    """Keys `<class>/<name>` for (path, class name): [A-Za-z0-9_-], at most 110 characters, unique.

    Characters outside are replaced; where that makes two keys equal, each of them ends in a hash of its path,
    so that a key does not depend on the order of the listing. Paths must differ.
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
    """Return `key`, or raise BuilderError where a file of that name could come to lie outside its folder."""
    if not SAFE_KEY.fullmatch(key):
        raise BuilderError(
            f"{where}: key {key!r}, expected <class>/<name> without dots, as `keys.py` gives them"
        )
    return key


def _stem(path: str, class_name: str) -> str:
    """Path without extension, from below the first folder named like the class, else the file name alone."""
    folders, _, name = posixpath.splitext(path)[0].rpartition("/")
    parts = folders.split("/")
    if class_name in parts:
        below = parts[parts.index(class_name) + 1 :]
        return "_".join([*below, name])
    return name


def _safe(text: str, limit: int) -> str:
    """Letters, digits, _ and - only; accents fall off; what is too long or left empty gets a hash."""
    text = unicodedata.normalize("NFC", text)
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", "".join(letters))
    if not safe.strip("_"):
        return _hash(text, HASH_CHARS)
    return safe if len(safe) <= limit else f"{safe[: limit - HASH_CHARS - 1]}-{_hash(text, HASH_CHARS)}"


def _hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]
