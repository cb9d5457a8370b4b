"""Bytes that anybody may have written → plain data and arrays. Whatever is wrong with them is a ValueError.

Memory and time stay near the size of the bytes: a header that promises more than follows is refused before anything is
allocated. No other module of the packages calls `json.loads`, `yaml.safe_load`, `numpy.load` or the like.
"""

from __future__ import annotations

import io
import json
import math
import pickletools
import re
import stat
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

DOCUMENT_BYTES = 2**28
"""Longest JSON that is parsed, and longest file that is read for it; an index of a million tars takes 2**27."""
YAML_BYTES = 4 * 2**20
"""Longest YAML that is parsed."""
YAML_VALUES = 1_000_000
"""Most values that its aliases may expand to."""
MEMBER_BYTES = 2**30
"""Largest array that is read out of an npz file where it is compressed; a plain one takes no more than the file."""
HEADER_BYTES = 10_000
"""Longest header of an array, as in numpy."""
PICKLE_BYTES = 256 * 2**20
"""Longest pickle inside a file of torch, which holds names and shapes; the numbers lie beside it."""
PICKLE_STEPS = 20_000_000
"""Most instructions of such a pickle."""
TENSOR_PARTS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v[23]|parameter)|torch Size"
    r"|torch (u?int|b?float|complex)\d+\w*|torch bool"
    r"|torch \w*Storage|torch\.storage \w*Storage"
)
"""All that a pickle of plain tensors names."""
FORBIDDEN = frozenset(
    {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
)
"""Instructions that make other objects, which torch does not write for tensors."""
ZIP_START = b"PK\x03\x04"
LEGACY_PICKLES = 5
"""A file of torch before 1.6: magic number, version, machine, tensors and keys as pickles, then the numbers."""
KINDS = "biufcSU"
"""Kinds of dtypes that hold plain values; objects, which only pickle could read, are none."""


def read_document(path: Path, most: int = DOCUMENT_BYTES) -> bytes:
    """Read a file that anybody may have put there. Raises ValueError for a device, a pipe, and more than `most` bytes.

    A missing file raises FileNotFoundError, as from any other reader.
    """
    if isinstance(path, Path):  # a place at a URL is none, and holds neither devices nor pipes
        status = path.stat()
        if not (
            stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        ):  # reading a folder fails by itself
            raise ValueError("it is no regular file")
        _check_length(status.st_size, most)
    return path.read_bytes()


def read_object(filesystem: AbstractFileSystem, path: str, most: int = DOCUMENT_BYTES) -> bytes:
    """Read a file of any file system. Raises ValueError for more than `most` bytes, which are not fetched."""
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


def parse_npy(data: bytes) -> np.ndarray:
    """Parse a .npy file of plain values. Raises ValueError."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(stream, max_header_size=HEADER_BYTES)
    except Exception as error:  # numpy and the parser of Python raise errors of many kinds
        raise ValueError(f"not the header of an array ({str(error)[:200] or type(error).__name__})") from None
    if dtype.kind not in KINDS or dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype}, expected plain numbers or text")
    content, expected = memoryview(data)[stream.tell() :], math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or len(content) != expected:
        raise ValueError(f"{len(content)} bytes follow the header of {dtype} {shape}, expected {expected}")
    flat = np.frombuffer(bytearray(content), dtype=dtype) if content else np.empty(0, dtype)
    return flat.reshape(shape[::-1]).T if is_fortran else flat.reshape(shape)


def parse_npz(file: BinaryIO | bytes, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file: those of `names` that it holds, by default all. Raises ValueError."""
    try:
        with zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file) as archive:
            found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            members = {name: info for name, info in found.items() if names is None or name in names}
            arrays = {}
            for name, info in members.items():
                if info.file_size > MEMBER_BYTES and info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"{name} has {info.file_size:,} bytes, expected at most {MEMBER_BYTES:,}"
                    )
                with archive.open(info) as member:
                    arrays[name] = parse_npy(member.read(info.file_size + 1))
    except OSError:
        raise
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is no npz file, or a damaged one ({error})") from None
    except Exception as error:  # zipfile and its decompressors raise errors of many kinds
        raise ValueError(str(error)[:200] or type(error).__name__) from None
    return arrays


def check_pickle(path: Path) -> None:
    """Raise ValueError unless a file of `torch.save` holds nothing but plain tensors, without loading any of it.

    `weights_only=True` refuses code; this refuses, before anything is allocated, what is large where the file is small:
    compressed members, sizes beyond the file, pickles without end, and instructions that tensors do not need.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(ZIP_START)) == ZIP_START  # what torch asks too
            file.seek(0)
            if not is_zip:
                for _ in range(LEGACY_PICKLES):
                    _check_instructions(file)
                return
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if sum(info.file_size for info in members) > size or any(
                    info.compress_type for info in members
                ):
                    raise ValueError("its members are compressed, or larger than the file")
                (described,) = (info for info in members if info.filename.endswith("/data.pkl"))
                if described.file_size > PICKLE_BYTES:
                    raise ValueError(f"its description has {described.file_size:,} bytes")
                with archive.open(described) as content:
                    _check_instructions(io.BytesIO(content.read(PICKLE_BYTES)))
    except OSError:
        raise
    except Exception as error:  # zipfile and pickletools raise errors of many kinds
        raise ValueError(
            f"not plain tensors of torch.save: {str(error)[:200] or type(error).__name__}"
        ) from None


def check_sizes(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if one of the tensors that were read from a file is larger than the file.

    A pickle can repeat one number without end, and whoever copies or converts such a tensor would take its full size.
    """
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if (found := getattr(tensor, "nbytes", 0)) > size:
            raise ValueError(f"{name} has {found:,} bytes in a file of {size:,}")


def _check_instructions(content: Any) -> None:
    """Read one pickle instruction by instruction; raises ValueError for one that tensors do not need."""
    for number, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if number > PICKLE_STEPS:
            raise ValueError(f"more than {PICKLE_STEPS:,} instructions")
        if instruction.name in FORBIDDEN:
            raise ValueError(f"the instruction {instruction.name}, which makes other objects")
        if instruction.name == "GLOBAL" and not TENSOR_PARTS.fullmatch(str(argument)):
            raise ValueError(f"it names {str(argument).replace(' ', '.')}, which is no part of a tensor")
