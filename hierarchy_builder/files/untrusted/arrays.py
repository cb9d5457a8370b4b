"""Arrays that anybody may have written. Whatever is wrong with their bytes is a ValueError; see `documents.py`."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection
from typing import Any, BinaryIO

import numpy as np

MEMBER_BYTES = 2**30
"""Largest array that is read out of an npz file where it is compressed; a plain one takes no more than the file."""
HEADER_BYTES = 10_000
"""Longest header of an array, as in numpy."""
KINDS = "biufcSU"
"""Kinds of dtypes that hold plain values; objects, which only pickle could read, are none."""


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


def npz_of(**arrays: Any) -> bytes:
    """The .npz file of some arrays, which holds no pickle; its zip holds a checksum of each. `parse_npz` reads it."""
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


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
