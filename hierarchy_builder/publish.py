"""What stands beside the tars: index, class map, statistics, dataset card; `_SUCCESS` last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hierarchy_builder import __version__, stores
from hierarchy_builder.artefacts import BuildFolder, read_json, remove, write_bytes, write_json
from hierarchy_builder.config import ShardConfig
from hierarchy_builder.ledger import stage_entry
from hierarchy_builder.records import (
    CANVASES_MEMBER,
    FEATURES_MEMBER,
    FORMAT_VERSION,
    IMAGE_MEMBER,
    LABEL_MEMBER,
    METADATA_MEMBER,
    REGIONS_MEMBER,
)
from hierarchy_builder.shards import shard_name, sidecar
from hierarchy_builder.statistics import Moments, merge_tree, write_statistics

SUCCESS = "_SUCCESS"


def publish_shards(folder: BuildFolder, config: ShardConfig, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the files of the whole set once every tar is there. `results` are the markers of the tars, in order."""
    shards = folder.shards
    remove_strays(shards, config.split, len(results))
    index = _index(folder, config, results)
    write_json(shards / "index.json", index)
    write_json(shards / "class_map.json", read_json(folder.class_map))
    write_statistics(shards / "statistics.npz", dataset_moments(folder))
    write_bytes(shards / "README.md", _card(index).encode())
    digest = hashlib.sha256((shards / "index.json").read_bytes()).hexdigest()
    write_json(shards / SUCCESS, {"count": index["num_samples"], "index_sha256": digest})


def dataset_moments(folder: BuildFolder) -> Moments:
    """Moments of all usable features per position and channel, merged over a fixed tree of blocks."""
    group = stores.open_store(folder.features)
    counts, means, squares = (
        stores.array_of(group, name) for name in ("block_count", "block_mean", "block_m2")
    )
    return merge_tree(
        Moments(int(np.asarray(counts[block])), np.asarray(means[block]), np.asarray(squares[block]))
        for block in range(counts.shape[0])
    )


def remove_strays(shards: Path, split: str, num_shards: int) -> None:
    """Remove tars and temporary files that a longer or interrupted earlier run left behind."""
    expected = {shard_name(split, number) for number in range(num_shards)}
    for tar in shards.glob("*.tar"):
        if tar.name not in expected:
            remove(sidecar(tar))
            remove(tar)
    for temporary in shards.glob("*.tmp-*"):
        remove(temporary)


def _index(folder: BuildFolder, config: ShardConfig, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    extracted, clustered = stage_entry(folder, "extract")["inputs"], stage_entry(folder, "cluster")["inputs"]
    encoder, recipe = extracted["encoder"], clustered["config"]
    members = [FEATURES_MEMBER, REGIONS_MEMBER, LABEL_MEMBER, METADATA_MEMBER]
    members += [CANVASES_MEMBER] * config.canvases + [IMAGE_MEMBER] * config.images
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "format_version": FORMAT_VERSION,
        "code_version": __version__,
        "name": f"teacher-hierarchies-{encoder['name']}",
        "split": config.split,
        "shardlist": [
            {
                "url": shard_name(config.split, number),
                "nsamples": result["count"],
                "filesize": result["bytes"],
                "sha256": result["sha256"],
            }
            for number, result in enumerate(results)
        ],
        "num_samples": sum(result["count"] for result in results),
        "num_levels": len(recipe["cuts"]) + 2,
        "grid": list(encoder["grid"]),
        "width": encoder["width"],
        "num_classes": extracted["num_classes"],
        "members": sorted(members),
        "encoder": encoder,
        "recipe": recipe,
        "config_hash": stage_entry(folder, "shard")["hash"],
    }


def _card(index: Mapping[str, Any]) -> str:
    encoder, levels = index["encoder"], index["num_levels"]
    height, width = index["grid"]
    total = sum(entry["filesize"] for entry in index["shardlist"])
    head = {
        "pretty_name": f"Teacher hierarchies ({encoder['name']})",
        "task_categories": ["unconditional-image-generation", "image-segmentation"],
        "size_categories": [_size_category(index["num_samples"])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": index["split"], "path": f"{index['split']}-*.tar"}],
            }
        ],
    }
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# Teacher hierarchies

{index["num_samples"]} images of {index["num_classes"]} classes in {len(index["shardlist"])} webdataset shards
({total:,} bytes). Per image: patch features of `{encoder["name"]}` on a {height}×{width} grid and {levels - 1} nested
maps of regions (object/background first), from which {levels} level canvases follow: each token replaced by the mean
of its region; the last level is the features themselves.

| member | content |
|---|---|
| `features.npy` | float16 [{height}, {width}, {index["width"]}] |
| `regions.npy` | uint8 [{levels - 1}, {height}, {width}], coarse → fine, 0 is background |
| `cls` | class id as decimal text, see `class_map.json` |
| `json` | path of the image, class name, size, regions per level |
| `jpg` | optional: the crop the features came from |
| `canvases.npy` | optional: float16 [{levels}, {height}, {width}, {index["width"]}] |

Encoder weights: `{encoder["weights_hash"]}`. Recipe: `{dict(index["recipe"])}`.
Configuration: `{index["config_hash"]}`. `statistics.npz` holds exact mean and variance per channel and per position.

The licence of the source images applies to everything derived from them.
"""


def _size_category(count: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if count < bound), "1M<n<10M")
