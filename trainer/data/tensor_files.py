"""Tensors in safetensors files, read from anybody, where whatever is wrong is a ValueError, and written with a seal.

The library writes the text beside the tensors in an order that changes from call to call, so `tensor_bytes` orders it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hierarchy_builder.files.untrusted.documents import parse_json
from hierarchy_builder.files.whole import BLANK, SEAL, check_seal, seal

COLON = b":"
"""What stands between a name and its value in the header."""
LENGTH_BYTES = 8
"""Bytes at the start of a file that hold the length of its header."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors, on the CPU, and the text beside them. Raises ValueError, or OSError if it cannot be read.

    The format holds nothing else, and its header is checked against the size of the file before anything is allocated.
    """
    if not path.is_file():
        open(path, "rb").close()  # an error that says why
        raise ValueError("not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # the library raises its own error, and torch others for dtypes it lacks
        raise ValueError(str(error)[:200] or type(error).__name__) from None


def tensor_bytes(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> bytes:
    """The bytes of a file of tensors and text by name, sealed: SEAL is their SHA-256 with zeros in its place."""
    plain = save(dict(tensors))
    length = int.from_bytes(plain[:LENGTH_BYTES], "little")
    places = parse_json(plain[LENGTH_BYTES : LENGTH_BYTES + length])
    header = {"__metadata__": dict(sorted({**text, SEAL: BLANK}.items())), **places}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % LENGTH_BYTES)
    whole = len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded + plain[LENGTH_BYTES + length :]
    return seal(whole, COLON)


def read_sealed(path: Path) -> dict[str, Tensor]:
    """Read tensors of a file that may be sealed, and check the seal if it is. Raises ValueError or OSError."""
    tensors, text = read_tensors(path)
    if SEAL in text:
        check_tensor_seal(path, text[SEAL])
    return tensors


def check_tensor_seal(path: Path, digits: str | None) -> None:
    """Raise ValueError unless the file is as `tensor_bytes` made it. digits: what its text names SEAL."""
    check_seal(path.read_bytes(), digits, COLON)
