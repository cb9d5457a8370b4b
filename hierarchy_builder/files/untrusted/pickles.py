"""Files of `torch.save` that anybody may have written, looked at before torch reads them; see `documents.py`."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
