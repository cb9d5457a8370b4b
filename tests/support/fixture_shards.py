"""A tiny finished shard folder, written with plain tarfile: what the shard format looks like, byte by byte."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

GRID = (4, 4)
WIDTH = 3
NUM_LEVELS = 4
CLASS_NAMES = ("ant", "bee", "cat")
CLASS_MAP = {name: label for label, name in enumerate(CLASS_NAMES)}


def make_sample(number: int, generator: np.random.Generator) -> tuple[str, int, np.ndarray, np.ndarray]:
    """(key, label, features, regions): an object in the middle rows, split in two, then in four columns."""
    label = number % len(CLASS_NAMES)
    height, width = GRID
    rows, columns = np.indices(GRID)
    is_object = (rows >= 1) & (rows < height - 1)
    regions = np.stack(
        [is_object, is_object * (1 + columns // (width // 2)), is_object * (1 + columns)]
    ).astype(np.uint8)
    features = generator.normal(label - 1, 0.3, (height, width, WIDTH)) + 2.0 * is_object[..., None]
    return f"{CLASS_NAMES[label]}/image{number:04d}", label, features.astype(np.float16), regions


def write_shards(
    folder: Path,
    num_samples: int = 24,
    per_shard: int = 7,
    seed: int = 0,
    int8: bool = False,
    offset: float = 0.0,
    factor: float = 1.0,
    pictures: bool = False,
    class_map: Mapping[str, int] = MappingProxyType(CLASS_MAP),
) -> Path:
    """Write a finished shard folder of `num_samples` samples, features times `factor` plus `offset`, and return it.

    pictures: with the JPEG that `picture_of` draws for each. class_map: ids of the classes, and maybe of others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    drawn = (make_sample(number, generator) for number in range(num_samples))
    samples = [
        (key, label, (factor * features + offset).astype(np.float16), regions)
        for key, label, features, regions in drawn
    ]
    entries = []
    for shard, first in enumerate(range(0, num_samples, per_shard)):
        rows = samples[first : first + per_shard]
        name = f"train-{shard:06d}.tar"
        (folder / name).write_bytes(_tar(rows, int8, pictures, class_map))
        entries.append(_entry(folder / name, len(rows)))
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "format_version": 1,
        "name": "tiny",
        "split": "train",
        "shardlist": entries,
        "num_samples": num_samples,
        "num_levels": NUM_LEVELS,
        "grid": list(GRID),
        "width": WIDTH,
        "num_classes": len(class_map),
        "members": ["features.npy", "regions.npy", "cls", "json"],
        "encoder": {
            "name": "drawn",
            "image_size_px": 32,
            "grid": list(GRID),
            "width": WIDTH,
            "normalisation": "none",
            "weights_hash": "",
            "decoder": None,
        },
        "recipe": {"cuts": [0.65, 0.35]},
        "config_hash": hashlib.sha256(f"{num_samples} {seed} {int8}".encode()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "class_map.json").write_text(json.dumps(dict(class_map)))
    features = np.stack([sample[2] for sample in samples]).astype(np.float64)
    np.savez(
        folder / "statistics.npz",
        mean=features.mean(axis=0),
        variance=features.var(axis=0),
        channel_mean=features.mean(axis=(0, 1, 2)),
        channel_variance=features.var(axis=(0, 1, 2)),
    )
    vouch(folder)
    return folder


def vouch(folder: Path) -> None:
    """Write `_SUCCESS`: digests of the files beside the tars, and one of its own text with zeros in its place."""
    files = ("index.json", "class_map.json", "statistics.npz")
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in files
        if (folder / name).exists()
    }
    content = {"count": 0, "index_sha256": digests["index.json"], "files": digests}
    text = json.dumps({**content, "document_sha256": "0" * 64})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "_SUCCESS").write_text(text.replace("0" * 64, digest))


def change_index(folder: Path, **fields: object) -> None:
    """Change fields of index.json, as if the set had been built with them."""
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **fields}))
    vouch(folder)


def reindex(folder: Path) -> None:
    """Make index.json agree with the tars again after a test changed one."""
    index = json.loads((folder / "index.json").read_text())
    for number, old in enumerate(index["shardlist"]):
        index["shardlist"][number] = _entry(folder / old["url"], old["nsamples"])
    (folder / "index.json").write_text(json.dumps(index))
    vouch(folder)


def _entry(path: Path, num_samples: int) -> dict[str, object]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return {"url": path.name, "nsamples": num_samples, "filesize": len(data), "sha256": digest}


def picture_of(features: np.ndarray) -> Image.Image:
    """A picture that follows from features [H, W, 3]: 8×8 pixels a token, its channels as colours."""
    colours = (255 / (1 + np.exp(-features.astype(np.float32)))).astype(np.uint8)
    return Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1))


def _tar(
    rows: list[tuple[str, int, np.ndarray, np.ndarray]],
    int8: bool,
    pictures: bool,
    class_map: Mapping[str, int],
) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, label, features, regions in rows:
            members = {"regions.npy": npy(regions), "cls": str(class_map[CLASS_NAMES[label]]).encode()}
            members["json"] = json.dumps({"path": f"{key}.png", "class_name": CLASS_NAMES[label]}).encode()
            if pictures:
                jpeg = io.BytesIO()
                picture_of(features).save(jpeg, "JPEG", quality=95)
                members["jpg"] = jpeg.getvalue()
            if int8:
                scale = np.abs(features.astype(np.float32)).max(-1, keepdims=True) / 127
                members["scale.npy"] = npy(scale)
                members["features.npy"] = npy(np.rint(features / scale).astype(np.int8))
            else:
                members["features.npy"] = npy(features)
            for member, data in members.items():
                add_member(tar, f"{key}.{member}", data)
    return stream.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def npy(array: np.ndarray) -> bytes:
    """The array as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()
