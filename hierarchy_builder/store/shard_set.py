"""Write the files next to the tars: index, class map, statistics and dataset card, and `_SUCCESS` at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hierarchy_builder import __version__
from hierarchy_builder.config import HierarchyRecipe, ShardConfig
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.files.exclusion import still_ours
from hierarchy_builder.files.whole import (
    read_json,
    readable_json,
    sha256_file,
    write_bytes,
    write_json,
    write_sealed_json,
)
from hierarchy_builder.images.listings import in_text_order
from hierarchy_builder.records import (
    CANVASES_MEMBER,
    FEATURES_MEMBER,
    FORMAT_VERSION,
    IMAGE_MEMBER,
    LABEL_MEMBER,
    METADATA_MEMBER,
    REGIONS_MEMBER,
    SCALE_MEMBER,
)
from hierarchy_builder.store.croissant import CROISSANT, croissant_of
from hierarchy_builder.store.folder import BuildFolder, is_own_about
from hierarchy_builder.store.ledger import is_fused, open_ledger, recorded_stages, stage_entry
from hierarchy_builder.store.preview import PREVIEW, preview_of
from hierarchy_builder.store.quantisation import measure_quantisation
from hierarchy_builder.store.shards import read_shard, shard_name, sidecar
from hierarchy_builder.store.statistics import Moments, merge_tree, read_part_moments, write_statistics
from hierarchy_builder.store.stored import Stored, fitted_vocabulary
from hierarchy_builder.store.units import stage_units, usable_rows
from hierarchy_builder.terminal import counted

SUCCESS = "_SUCCESS"
ABOUT = ("index.json", "class_map.json", "statistics.npz", "vocabulary.npz", "README.md", CROISSANT, PREVIEW)
"""Files beside the tars, whose SHA-256 `_SUCCESS` holds."""

UNFOLDED_CLASSES = 20
"""Classes that the card lists openly; more are folded."""


def publish_shards(folder: BuildFolder, config: ShardConfig, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the files of the whole set when all tars are finished. results: the markers of the tars, in order."""
    shards = folder.shards
    still_ours(folder.root)
    remove_surplus(folder, config.split, len(results))
    index = index_of(folder, config, results)
    if config.feature_dtype == "int8":
        recipe = from_mapping(HierarchyRecipe, index["recipe"])  # without label maps
        index["quantisation"] = measure_quantisation(folder, recipe, usable_rows(folder))
    write_json(shards / "index.json", index)
    ids = stage_entry(folder, "extract").get("class_map") or read_json(folder.class_map)
    write_json(shards / "class_map.json", ids)
    joint = dataset_moments(folder, joint=True) if config.covariance else None
    write_statistics(shards / "statistics.npz", dataset_moments(folder), joint)
    if index["vocabulary"]:
        write_bytes(shards / folder.vocabulary.name, fitted_vocabulary(folder).read_bytes())
    else:
        folder.remove(shards / folder.vocabulary.name)
    if not has_earlier_card(shards, index):
        write_bytes(shards / "README.md", card_of(index, ids).encode())
        if is_own_about(shards / CROISSANT):
            write_json(shards / CROISSANT, croissant_of(index, ids))
        if is_own_about(shards / PREVIEW):
            write_bytes(shards / PREVIEW, preview_of(read_shard(shards / shard_name(config.split, 0))))
    write_success(shards, index["num_samples"])


def write_success(shards: Path, count: int) -> None:
    """Write `_SUCCESS`, sealed: the number of samples and the SHA-256 of each file beside the tars.

    What an earlier release wrote (count and index_sha256, without a seal) stays as it is where it is true.
    """
    files = (shards / name for name in ABOUT)
    digests = {path.name: sha256_file(path) for path in files if path.is_file() and is_own_about(path)}
    earlier = {"count": count, "index_sha256": digests["index.json"]}
    if readable_json(shards / SUCCESS) != earlier:
        still_ours(shards)
        write_sealed_json(shards / SUCCESS, {**earlier, "files": digests})


def success_problems(shards: Path, index: Mapping[str, Any]) -> Iterator[str]:
    """Compare the files beside the tars with `_SUCCESS`, which is sealed and holds the SHA-256 of each."""
    path, index_path = shards / SUCCESS, shards / "index.json"
    if not path.is_file():
        yield f"{path} is missing: the set was not finished"
        return
    found = read_json(path)
    if found.keys() != {"count", "index_sha256"}:  # all that earlier releases wrote
        found = read_json(path, sealed=True)
    for name, digest in found.get("files", {}).items():
        if not (shards / name).is_file() or sha256_file(shards / name) != digest:
            yield f"{shards / name} was changed after the set was finished"
    if found.get("index_sha256") != (sha256_file(index_path) if index_path.is_file() else ""):
        yield f"{index_path} was changed after the set was finished"
    if found.get("count") != index["num_samples"]:
        yield f"{path}: {found.get('count')} samples, the markers have {index['num_samples']}"


def dataset_moments(folder: BuildFolder, *, joint: bool = False) -> Moments:
    """Merge the moments of all usable features by position and channel over a fixed tree of blocks.

    joint: merge mean [C] and scatter matrix [C, C] of all usable tokens instead. Raises BuilderError when the scatter
    matrices of the blocks were not computed.
    """
    units, stored = stage_units(folder, "extract"), Stored(folder)
    if is_fused(folder):  # its parts take the place of stores
        markers = open_ledger(folder, "fuse").results(len(units))
        parts = (read_part_moments(folder, each["unit"], each, joint=joint) for each in markers)
        return merge_tree(parts)
    return merge_tree(stored.moments(block, joint=joint) for block in units)


def remove_surplus(folder: BuildFolder, split: str, num_shards: int) -> None:
    """Remove tars of an earlier run that wrote more of them, and temporary files of interrupted runs."""
    expected = {shard_name(split, number) for number in range(num_shards)}
    for tar in folder.shards.glob("*.tar"):
        if tar.name not in expected:
            folder.remove(sidecar(tar), split)
            folder.remove(tar, split)
    folder.remove_leftovers(folder.shards)


def index_of(
    folder: BuildFolder, config: ShardConfig, results: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the content of index.json, except the measured error of int8."""
    stages = recorded_stages(folder)
    extracted, recipe = stages["extract"]["inputs"], stages["cluster"]["inputs"]["config"]
    encoder = extracted["encoder"]
    members = [FEATURES_MEMBER, REGIONS_MEMBER, LABEL_MEMBER, METADATA_MEMBER]
    is_int8 = config.feature_dtype == "int8"
    members += [SCALE_MEMBER] * is_int8 + [CANVASES_MEMBER] * config.canvases + [IMAGE_MEMBER] * config.images
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
        "feature_dtype": config.feature_dtype,
        "quantisation": None,
        "encoder": encoder,
        "recipe": recipe,
        "vocabulary": stages["vocabulary"]["inputs"]["config"]["sizes"] if "link" in stages else None,
        "config_hash": stages["shard"]["hash"],
        **({"image_px": config.image_px} if config.image_px is not None else {}),
        **({"licence": config.licence} if config.licence is not None else {}),
    }


def has_earlier_card(shards: Path, index: Mapping[str, Any]) -> bool:
    """Whether the card is the one that an earlier release wrote for this index, which stays as it is."""
    card = shards / "README.md"
    return card.is_file() and "licence" not in index and card.read_bytes() == card_of(index).encode()


def card_of(index: Mapping[str, Any], class_map: Mapping[str, int] | None = None) -> str:
    """Return the dataset card, which follows from index.json and class_map.json.

    Without class_map it is the card of an earlier release: no licence, no classes, nothing on how to read it.
    """
    encoder, levels = index["encoder"], index["num_levels"]
    height, width = index["grid"]
    features = f"| `features.npy` | {index['feature_dtype']} [{height}, {width}, {index['width']}] |"
    if index["quantisation"] is not None:
        features += f"\n| `scale.npy` | float32 [{height}, {width}, 1]; a feature is int8 · scale |"
    sizes = index["vocabulary"]
    prototypes = "" if sizes is None else f", prototype of each part (of {sizes[-1]:,} in `vocabulary.npz`)"
    size = f", of {index['image_px']} px a side" if "image_px" in index else ""
    total = sum(entry["filesize"] for entry in index["shardlist"])
    licence = index.get("licence", "unknown")
    use, licensed = "", ""
    if class_map is not None:
        use, licensed = _use_of(index, class_map), f"Licence: {licence}. "
    head = {
        **({} if class_map is None else {"license": licence}),
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

{counted(index["num_samples"], "image")} of {counted(index["num_classes"], "class", "classes")} in
{counted(len(index["shardlist"]), "webdataset shard")} ({total:,} bytes). Per image: patch features of
`{encoder["name"]}` on a {height}×{width} grid and {levels - 1} nested maps of regions (object/background first), from
which {levels} level canvases follow: each token replaced by the mean of its region; the last level is the features
themselves.

| member | content |
|---|---|
{features}
| `regions.npy` | uint8 [{levels - 1}, {height}, {width}], nested ids, coarse → fine; level 0: 0 background, 1 object |
| `cls` | class id as decimal text, see `class_map.json` |
| `json` | path of the image, class name, size, regions per level{prototypes} |
{_optional_rows(index, size, earlier=class_map is None)}
{use}{_quantisation_note(index["quantisation"])}Encoder weights: `{encoder["weights_hash"]}`.
Recipe: `{dict(index["recipe"])}`.
Configuration: `{index["config_hash"]}`. `statistics.npz` holds exact moments per channel and per position.

{licensed}The licence of the source images applies to everything derived from them.
"""


def _optional_rows(index: Mapping[str, Any], size: str, *, earlier: bool) -> str:
    """Rows of the table for the members that not every set has; earlier releases listed them always."""
    shape = [index["num_levels"], *index["grid"], index["width"]]
    rows = {
        IMAGE_MEMBER: f"the crop the features came from{size}",
        CANVASES_MEMBER: f"float16 {shape}",
    }
    if earlier:
        return "".join(f"| `{name}` | optional: {content} |\n" for name, content in rows.items())
    return "".join(
        f"| `{name}` | {content} |\n" for name, content in rows.items() if name in index["members"]
    )


def _use_of(index: Mapping[str, Any], class_map: Mapping[str, int]) -> str:
    """The parts of the card that say how to read the set and which classes it has."""
    last = len(index["shardlist"]) - 1
    urls = f"{index['split']}-{{000000..{last:06d}}}.tar"
    names = sorted(class_map, key=class_map.__getitem__)
    lines = "\n".join(f"{class_map[name]}: {json.dumps(name, ensure_ascii=False)}" for name in names)
    classes = f"```yaml\n{lines}\n```"
    if len(names) > UNFOLDED_CLASSES:
        title = counted(len(names), "class", "classes")
        classes = f"<details><summary>{title}</summary>\n\n{classes}\n\n</details>"
    note = ""
    if in_text_order(names):
        note = """
The names of the classes are numbers and got ids in the order of text (1, 10, 2): the id of a class is not its number.
"""
    scaled = ' * sample["scale.npy"]' if SCALE_MEMBER in index["members"] else ""
    return f"""![Samples, one a row: the photograph if it is stored, and its regions from coarse to fine]({PREVIEW})

The regions of a level lie within those of the level before. Networks that draw an image level by level are trained on
such hierarchies; the method is Trajectory Forcing ([arXiv 2606.22527](https://arxiv.org/abs/2606.22527)).

## Reading it

In the folder of the tars:

```python
import webdataset

for sample in webdataset.WebDataset("{urls}", shardshuffle=False).decode():
    features, regions, label = sample["features.npy"]{scaled}, sample["regions.npy"], sample["cls"]
```

`{CROISSANT}` describes the files in the format Croissant. From the hub, with the name of the repository in place of
OWNER/NAME, `datasets.load_dataset("OWNER/NAME", split="{index["split"]}", streaming=True)` reads them too.

The Python package trajectory-hierarchies wrote the set. Its command `trainer train FOLDER --out RUN` trains a network
on it, and FOLDER may be a URL.

## Classes
{note}
{classes}

## Origin

"""


def _quantisation_note(found: Mapping[str, Any] | None) -> str:
    """Return a paragraph on the error of int8, or nothing for float16."""
    if found is None:
        return ""
    changed = ", ".join(f"{share:.3%}" for share in found["tokens_changed"])
    agreement = ", ".join(f"{index:.4f}" for index in found["agreement"])
    return f"""Features are int8 with one scale per token. Measured on {found["images"]} of these images: relative error
{found["relative_error"]:.3%}, smallest cosine of a token and its stored form {found["cosine"]:.6f}. The regions above
are those of the unrounded features; from the stored ones the recipe would put {changed} of the tokens elsewhere
(levels coarse → fine; adjusted Rand index {agreement}).

"""


def _size_category(count: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if count < bound), "1M<n<10M")
