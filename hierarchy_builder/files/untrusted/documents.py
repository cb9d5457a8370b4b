"""Documents that anybody may have written → plain data. Whatever is wrong with them is a ValueError.

Together with `arrays.py` and `pickles.py` beside it: memory and time stay near the size of the bytes, and a header that
promises more than follows is refused before anything is allocated. No module outside this folder calls `json.loads`,
`yaml.safe_load`, `numpy.load` or the like.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

DOCUMENT_BYTES = 2**28
"""Longest JSON that is parsed, and longest file that is read for it; an index of a million tars takes 2**27."""
YAML_BYTES = 4 * 2**20
"""Longest YAML that is parsed."""
YAML_VALUES = 1_000_000
"""Most values that its aliases may expand to."""


def read_document(path: Path, most: int = DOCUMENT_BYTES) -> bytes:
    """Read a file that anybody may have put there. Raises ValueError for a device, a pipe, and more than `most` bytes.

    A missing file raises FileNotFoundError, as from any other reader.
    """
    if isinstance(path, Path):  # a place at a URL is none, and holds neither devices nor pipes
        status = path.stat()
        # Reading a folder fails by itself.
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ValueError("it is no regular file")
        _check_length(status.st_size, most)
    return path.read_bytes()


def read_object(filesystem: AbstractFileSystem, path: str, most: int = DOCUMENT_BYTES) -> bytes:
    """Read a file of any file system. Raises ValueError for more than `most` bytes, which are not fetched."""
    # imported here because --help must start at once
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(filesystem, LocalFileSystem):
        return read_document(Path(path), most)
    if "http" in filesystem.protocol:  # a web server may send without end, whatever it was asked for
        with filesystem.open(path, "rb", block_size=0, size=1) as file:
            data = file.read(most + 1)
    else:
        data = filesystem.cat_file(path, end=most + 1)
    _check_length(len(data), most)
    return data


def _check_length(found: int, most: int) -> None:
    if found > most:
        raise ValueError(f"it has more than {most:,} bytes")


def parse_json(data: bytes | str) -> Any:
    """Parse JSON. Raises ValueError, also for what is too long or nested too deeply."""
    if len(data) > DOCUMENT_BYTES:
        raise ValueError(f"{len(data):,} bytes of JSON, expected at most {DOCUMENT_BYTES:,}")
    try:
        return json.loads(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def parse_yaml(data: bytes | str) -> Any:
    """Parse YAML of plain data. Raises ValueError, also for what is nested too deeply or expands to too much."""
    if len(data) > YAML_BYTES:
        raise ValueError(f"{len(data):,} bytes of YAML, expected at most {YAML_BYTES:,}")
    try:
        content = yaml.safe_load(data if isinstance(data, str) else data.decode("utf-8-sig"))
        count = _count_values(content, {})
    except RecursionError:
        raise ValueError("it is nested too deeply, or contains itself") from None
    except Exception as error:  # constructors of PyYAML raise errors of many kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if count > YAML_VALUES:
        raise ValueError(f"its aliases expand to {count:,} values, expected at most {YAML_VALUES:,}")
    return content


def _count_values(content: Any, known: dict[int, int]) -> int:
    """Number of values in nested data, in which the same list may occur many times."""
    if not isinstance(content, dict | list | tuple | set):
        return 1
    if id(content) not in known:
        inner = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + len(content) + sum(_count_values(each, known) for each in inner)
    return known[id(content)]
