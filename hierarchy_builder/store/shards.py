"""Write samples to tars and read them, and the sidecar of each tar.

A tar is plain webdataset: the members of a sample are adjacent and named `<key>.<member>`. mtime, uid and gid are 0
and members are sorted, so equal samples give equal bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hierarchy_builder.config import ShardConfig
from hierarchy_builder.errors import BuilderError
from hierarchy_builder.files.remote import store_error
from hierarchy_builder.files.untrusted.arrays import parse_npy
from hierarchy_builder.files.whole import atomic_file, decoding, parse_json, readable_json, write_json
from hierarchy_builder.images.keys import check_key
from hierarchy_builder.records import (
    CANVASES_MEMBER,
    FEATURES_MEMBER,
    IMAGE_MEMBER,
    LABEL_MEMBER,
    METADATA_MEMBER,
    REGIONS_MEMBER,
    SCALE_MEMBER,
    Sample,
)

TAR_BLOCK = 512
JPEG_BYTES_PER_PIXEL = 0.55
"""Average over 1,000 photos at quality 95 and 256 px, used to estimate how many samples fill a shard.

Single photos differ by 30 %. Small images take more per pixel (64 px: 0.9), large ones less (512 px: 0.35).
"""

ARRAY_MEMBERS = {
    FEATURES_MEMBER: "features",
    SCALE_MEMBER: "scale",
    REGIONS_MEMBER: "regions",
    CANVASES_MEMBER: "canvases",
}
"""Fields of `Sample` that are arrays, by member."""


def shard_name(split: str, number: int) -> str:
    """Return a name such as `train-000000.tar`; numbers are contiguous from 0."""
    return f"{split}-{number:06d}.tar"


def sidecar(tar: Path) -> Path:
    """Return the JSON file of a tar, which holds its count, bytes, sha256 and configuration hash."""
    return tar.with_suffix(".json")


def sidecar_problems(tar: Path, told: Mapping[str, Any]) -> Iterator[str]:
    """Compare the sidecar of a tar with the fields of the same names in what is told of the tar."""
    if readable_json(sidecar(tar)) != {
        name: told[name] for name in ("count", "bytes", "sha256", "config_hash")
    }:
        yield f"{sidecar(tar)} is missing or belongs to another tar"


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """Return the members of a sample by name: arrays as .npy without pickle, label as text, JSON with sorted keys."""
    arrays = {name: getattr(sample, field) for name, field in ARRAY_MEMBERS.items()}
    members = {name: _npy(array) for name, array in arrays.items() if array is not None}
    members[LABEL_MEMBER] = str(sample.label).encode()
    members[METADATA_MEMBER] = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False).encode()
    if sample.image is not None:
        members[IMAGE_MEMBER] = sample.image
    return members


def decode_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    """Invert `encode_sample`. Raises BuilderError naming the key and the member that is missing or damaged."""
    for name in (FEATURES_MEMBER, REGIONS_MEMBER, LABEL_MEMBER, METADATA_MEMBER):
        if name not in members:
            raise BuilderError(f"sample {key} has no {name}, found {', '.join(sorted(members)) or 'nothing'}")
    with decoding(f"sample {key} is"):
        arrays = {field: parse_npy(members[name]) for name, field in ARRAY_MEMBERS.items() if name in members}
        label, metadata = int(members[LABEL_MEMBER]), parse_json(members[METADATA_MEMBER])
    if (arrays["features"].dtype == np.int8) != ("scale" in arrays):
        raise BuilderError(
            f"sample {key} has {FEATURES_MEMBER} of {arrays['features'].dtype} "
            f"{'with' if 'scale' in arrays else 'without'} {SCALE_MEMBER}, which belongs to int8 only"
        )
    return Sample(key=key, label=label, metadata=metadata, image=members.get(IMAGE_MEMBER), **arrays)


def write_shard(tar: Path, samples: Iterable[Sample], *, config_hash: str) -> dict[str, Any]:
    """Write one tar as a whole, then its sidecar; returns the content of the sidecar.

    Raises BuilderError when two samples share a key.
    """
    with atomic_file(tar) as file:
        writer = TarWriter(file)
        for sample in samples:
            if sample.key in writer.keys:
                raise BuilderError(f"{tar.name}: key {sample.key} occurs twice")
            writer.add(sample.key, encode_sample(sample))
        facts = {**writer.close(), "config_hash": config_hash}
    write_json(sidecar(tar), facts)
    return facts


def read_shard(tar: Path, opened: BinaryIO | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar in order, without unpacking files or following links.

    opened: its content, read from its position on. Raises BuilderError naming the tar, and the key when it is known.
    """
    try:
        with (
            contextlib.nullcontext(opened) if opened else tar.open("rb") as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            key, members = "", dict[str, bytes]()
            for info in archive:
                found, _, member = info.name.partition(".")  # keys hold no dot
                if members and found != key:
                    yield decode_sample(key, members)
                    members = {}
                key = check_key(found, f"{tar.name}, member {info.name}")
                is_plain = info.isreg() and not info.issparse()  # a sparse one may claim any size
                content = archive.extractfile(info) if is_plain else None
                if content is None:
                    raise BuilderError(f"{tar.name}: member {info.name} is not a file")
                members[member] = content.read()
            if members:
                yield decode_sample(key, members)
    except (tarfile.TarError, EOFError, OSError) as error:
        if told := store_error(error):
            raise told from error
        raise BuilderError(f"{tar}: not a whole tar ({error})") from None


def count_samples(folder: Path) -> int:
    """Count the samples of the finished tars of a folder by their sidecars; a damaged sidecar counts as 0."""
    counts = (readable_json(sidecar(tar)).get("count", 0) for tar in folder.glob("*.tar"))
    return sum(count for count in counts if isinstance(count, int))


def sample_bytes(config: ShardConfig, encoder: Mapping[str, Any], num_levels: int) -> int:
    """Estimate the bytes of one sample in a tar: members with headers and padding; images by their average size.

    encoder: its description, with `grid`, `width` and `image_size_px`.
    """
    tokens = math.prod(encoder["grid"])
    feature_bytes = tokens * encoder["width"] * np.dtype(config.feature_dtype).itemsize
    members = [128 + feature_bytes, 128 + tokens * (num_levels - 1), 4, 512]
    if config.feature_dtype == "int8":
        members.append(128 + tokens * 4)
    if config.canvases:
        members.append(128 + num_levels * tokens * encoder["width"] * 2)
    if (image_px := config.stored_px(encoder["image_size_px"])) is not None:
        members.append(int(image_px**2 * JPEG_BYTES_PER_PIXEL))
    return sum(TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK for size in members)


def _npy(array: np.ndarray) -> bytes:
    """Return the bytes that numpy.save writes, with one copy of the values only."""
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return b"".join((_npy_header(array.dtype, array.shape), array.view(np.uint8).data))


@functools.lru_cache(maxsize=64)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


class TarWriter:
    """Writes a tar in few large pieces, and records its SHA-256 and the length of every sample."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.keys: set[str] = set()
        self.sizes: list[int] = []

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Write one sample, its members sorted by name. Raises BuilderError for an unsafe key."""
        self.keys.add(check_key(key, "sample"))
        size = 0
        for name in sorted(members):
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mode = len(members[name]), 0o444
            padding = bytes(-info.size % TAR_BLOCK)
            for piece in (info.tobuf(tarfile.PAX_FORMAT), members[name], padding):
                self._write(piece)
                size += len(piece)
        self.sizes.append(size)

    def copy(self, sample: bytes) -> None:
        """Write the bytes of a sample of another tar."""
        self._write(sample)
        self.sizes.append(len(sample))

    def close(self) -> dict[str, Any]:
        """Write the end of the tar; returns `count`, `bytes` and `sha256` of the file."""
        length = sum(self.sizes)
        end = 2 * TAR_BLOCK
        end += -(length + end) % tarfile.RECORDSIZE
        self._write(bytes(end))
        return {"count": len(self.sizes), "bytes": length + end, "sha256": self._digest.hexdigest()}

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
