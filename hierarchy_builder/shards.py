"""Samples ↔ tar members, and the files beside the tars.

A tar of ours is plain webdataset: the members of a sample are adjacent and named `<key>.<member>`. mtime, uid and
gid are 0, members are sorted, so equal samples give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset

from hierarchy_builder.artefacts import atomic_file, write_json
from hierarchy_builder.errors import BuilderError
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
JPEG_BYTES_PER_PIXEL = 0.35
"""Average of a quality-95 crop of a photograph; used only to aim at a shard size."""

ARRAY_MEMBERS = (FEATURES_MEMBER, SCALE_MEMBER, REGIONS_MEMBER, CANVASES_MEMBER)


def shard_name(split: str, number: int) -> str:
    """`train-000000.tar`: a dash, six digits, contiguous from 0."""
    return f"{split}-{number:06d}.tar"


def sidecar(tar: Path) -> Path:
    """The JSON beside a tar: count, bytes, sha256 and the hash of its configuration."""
    return tar.with_suffix(".json")


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """Members of a sample by name; arrays as .npy without pickle, the label as decimal text, JSON with sorted keys."""
    arrays = {
        FEATURES_MEMBER: sample.features,
        SCALE_MEMBER: sample.scale,
        REGIONS_MEMBER: sample.regions,
        CANVASES_MEMBER: sample.canvases,
    }
    members = {name: _npy(array) for name, array in arrays.items() if array is not None}
    members[LABEL_MEMBER] = str(sample.label).encode()
    members[METADATA_MEMBER] = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False).encode()
    if sample.image is not None:
        members[IMAGE_MEMBER] = sample.image
    return members


def decode_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    """The inverse of `encode_sample`. Raises BuilderError naming the key and the member that is missing or damaged."""
    for name in (FEATURES_MEMBER, REGIONS_MEMBER, LABEL_MEMBER, METADATA_MEMBER):
        if name not in members:
            raise BuilderError(f"sample {key} has no {name}, found {', '.join(sorted(members)) or 'nothing'}")
    try:
        arrays = {
            name: np.load(io.BytesIO(members[name]), allow_pickle=False)
            for name in ARRAY_MEMBERS
            if name in members
        }
        label, metadata = int(members[LABEL_MEMBER]), json.loads(members[METADATA_MEMBER])
    except ValueError as error:
        raise BuilderError(f"sample {key} is damaged: {error}") from None
    if (arrays[FEATURES_MEMBER].dtype == np.int8) != (SCALE_MEMBER in arrays):
        raise BuilderError(
            f"sample {key} has {FEATURES_MEMBER} of {arrays[FEATURES_MEMBER].dtype} "
            f"{'with' if SCALE_MEMBER in arrays else 'without'} {SCALE_MEMBER}: it belongs to int8 and only there"
        )
    return Sample(
        key=key,
        label=label,
        features=arrays[FEATURES_MEMBER],
        scale=arrays.get(SCALE_MEMBER),
        regions=arrays[REGIONS_MEMBER],
        canvases=arrays.get(CANVASES_MEMBER),
        metadata=metadata,
        image=members.get(IMAGE_MEMBER),
    )


def write_shard(tar: Path, samples: Iterable[Sample], *, config_hash: str) -> dict[str, Any]:
    """Write one tar and its sidecar, whole or not at all; returns the sidecar's content.

    Raises BuilderError when two samples share a key.
    """
    keys: set[str] = set()
    with atomic_file(tar) as file:
        hashing = _HashingFile(file)
        with webdataset.TarWriter(hashing, encoder=False, mtime=0, user="", group="", mode=0o444) as writer:
            for sample in samples:
                if sample.key in keys:
                    raise BuilderError(f"{tar.name}: key {sample.key} occurs twice")
                keys.add(sample.key)
                writer.write({"__key__": sample.key, **encode_sample(sample)})
    facts = {
        "count": len(keys),
        "bytes": hashing.num_bytes,
        "sha256": hashing.digest.hexdigest(),
        "config_hash": config_hash,
    }
    write_json(sidecar(tar), facts)
    return facts


def read_shard(tar: Path) -> Iterator[Sample]:
    """Samples of a tar in order. Raises BuilderError naming the tar, and the key when it is known."""
    try:
        with tarfile.open(tar, "r:") as archive:
            key, members = "", dict[str, bytes]()
            for info in archive:
                found, _, member = info.name.partition(".")  # keys hold no dot
                if members and found != key:
                    yield decode_sample(key, members)
                    members = {}
                key = found
                content = archive.extractfile(info)
                if content is None:
                    raise BuilderError(f"{tar.name}: member {info.name} is not a file")
                members[member] = content.read()
            if members:
                yield decode_sample(key, members)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuilderError(f"{tar}: not a whole tar ({error})") from None


def sample_bytes(
    *,
    grid: tuple[int, int],
    width: int,
    num_levels: int,
    canvases: bool,
    image_size_px: int | None,
    feature_dtype: str = "float16",
) -> int:
    """Bytes one sample takes in a tar: members with their headers, padded; pictures by an average."""
    tokens = grid[0] * grid[1]
    feature_bytes = tokens * width * np.dtype(feature_dtype).itemsize
    members = [128 + feature_bytes, 128 + tokens * (num_levels - 1), 4, 512]
    if feature_dtype == "int8":
        members.append(128 + tokens * 4)
    if canvases:
        members.append(128 + num_levels * tokens * width * 2)
    if image_size_px is not None:
        members.append(int(image_size_px**2 * JPEG_BYTES_PER_PIXEL))
    return sum(TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK for size in members)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


class _HashingFile:
    """A file that is only written to, and that knows the SHA-256 and length of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()
