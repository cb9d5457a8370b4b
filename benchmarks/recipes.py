"""Recipes against a regular grid, random partitions and people's label maps, in one run without a build.

    python benchmarks/recipes.py IMAGES --masks LABELS --encoder onnx:FILE --recipes paper,paper-seeds,stable --ablate

Every photo is encoded four times (plain, mirrored, two crops one token apart), once for all recipes. The table has
one row per partition and level; grids and random partitions have as many regions as their recipe, image by image.
`paper-seeds` is the mean of ten seeds; --ablate adds `stable` with each field in turn as in `paper`, and `paper` with
it as in `stable`. --objects names a segmentation model whose class 0 is background: object IoU is then measured
against what it calls object. Adjusted Rand indices: flip, shift, seed, bf16. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import records

from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.encoders import Encoder, encode, load_encoder
from hierarchy_builder.hierarchy.recipe import build_hierarchy, check_nesting
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.quality.assessment import NUM_SEEDS, Views, encode_views, seed_scores, view_scores
from hierarchy_builder.quality.scores import Quality, baselines, cells_of, human_scores, region_scores
from hierarchy_builder.records import FEATURE_DTYPE

PAPER, STABLE = HierarchyRecipe.paper(), HierarchyRecipe.stable()
RECIPES = {
    "paper": [PAPER],
    "paper-seeds": [dataclasses.replace(PAPER, seed=seed) for seed in range(10)],
    "stable": [STABLE],
}
COLUMNS = {
    "regions": "regions",
    "connected": "connected",
    "within": "within",
    "between": "between",
    "object_iou": "object IoU",
    "covering": "covering",
    "boundary_f": "boundary F",
    "flip": "flip",
    "shift": "shift",
    "seed": "seed",
    "bfloat16": "bf16",
}


def load_photos(
    images: str, masks: Path | None, encoder: Encoder, limit: int | None = None
) -> tuple[Views, list[np.ndarray] | None]:
    """Views of the photos of a folder and, for each, people's label maps int64 [M, h, w]."""
    source = open_source(images)
    paths = [record.path for record in source.records[:limit]]
    photos = [decode_image(source.read(path))[0] for path in paths]
    views = encode_views(encoder, photos)
    if masks is None:
        return views, None
    folder = open_masks(masks)
    folder.check_photos(paths)
    maps = [
        folder.read(path, photo.size, encoder.image_size_px, cells_of(encoder.grid))
        for path, photo in zip(paths, photos, strict=True)
    ]
    for error in (error for _, refused in maps for error in refused):
        print(f"left out: {error}", file=sys.stderr)
    return views, [found for found, _ in maps]


def score_recipe(
    views: Views,
    recipe: HierarchyRecipe,
    humans: list[np.ndarray] | None = None,
    objects: list[np.ndarray] | None = None,
) -> Quality:
    """All scores of one recipe; `.by_level()` has their means over the photos."""
    features = views.plain.astype(FEATURE_DTYPE)
    found = build_hierarchy(features, recipe)
    scores = region_scores(features, found.regions)
    scores["seed"] = seed_scores(features, found.regions, recipe, NUM_SEEDS)
    scores |= view_scores(views, found.regions, recipe)
    if humans is not None:
        scores |= human_scores(found.regions, humans)
    if objects is not None:
        scores["object_iou"] = human_scores(found.regions[:, :1], objects)["object_iou"].repeat(
            recipe.num_levels - 1, 1
        )
        scores["object_iou"][:, 1:] = np.nan
    return Quality(scores=scores, violations=check_nesting(found.regions), flags=found.flags)


def ablations() -> dict[str, list[HierarchyRecipe]]:
    """Each field in which the two recipes differ, changed alone; cuts fit the tree, so they go with the weight."""
    fields = [field.name for field in dataclasses.fields(HierarchyRecipe)]
    differing = [name for name in fields if getattr(PAPER, name) != getattr(STABLE, name) and name != "cuts"]
    found = {}
    for name in differing:
        group = ["cuts", name] if name == "spatial_weight" else [name]
        for label, base, other in (("stable without", STABLE, PAPER), ("paper with", PAPER, STABLE)):
            changes = {field: getattr(other, field) for field in group}
            found[f"{label} {name}"] = [dataclasses.replace(base, **changes)]
    return found


def mean_quality(qualities: list[Quality]) -> Quality:
    """Scores averaged image by image over recipes."""
    scores = {
        name: np.mean([quality.scores[name] for quality in qualities], axis=0) for name in qualities[0].scores
    }
    return dataclasses.replace(qualities[0], scores=scores)


def predicted_objects(name: str, images: str, size_px: int, limit: int | None) -> list[np.ndarray]:
    """What a segmentation model calls object in each photo, int64 [1, h, w]; nothing where that is < 5 % or > 90 %."""
    model, source = load_encoder(name), open_source(images)
    photos = [decode_image(source.read(record.path))[0] for record in source.records[:limit]]
    crops = np.stack([crop_square(photo, size_px) for photo in photos])
    logits = np.concatenate([encode(model, crops[start : start + 16]) for start in range(0, len(crops), 16)])
    cells = cells_of(model.grid)[0] // model.grid[0]
    maps = (logits.argmax(axis=-1) != 0).astype(np.int64).repeat(cells, axis=1).repeat(cells, axis=2)
    return [found[None] if 0.05 < found.mean() < 0.9 else found[None][:0] for found in maps]


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if unknown := set(options.recipes.split(",")) - RECIPES.keys():
        parser.error(f"unknown recipes {', '.join(unknown)}: known are {', '.join(RECIPES)}")
    started = time.perf_counter()
    encoder = load_encoder(options.encoder)
    views, humans = load_photos(options.images, options.masks, encoder, options.limit)
    encoded = time.perf_counter()
    rows = {}
    objects = None
    if options.objects:
        objects = predicted_objects(options.objects, options.images, encoder.image_size_px, options.limit)
        print(f"{sum(map(len, objects))} photos with an object", file=sys.stderr)
    for name, recipes in asked(options).items():
        rows[name] = mean_quality([score_recipe(views, recipe, humans, objects) for recipe in recipes])
        if len(recipes) > 1 or name not in RECIPES:
            continue
        counts = rows[name].scores["regions"]
        blind = baselines(views.plain, counts, humans)
        if objects is not None:
            seen = baselines(views.plain, counts, objects)
            for kind, quality in blind.items():
                quality.scores["object_iou"] = seen[kind].scores["object_iou"]
        rows |= {f"{kind} as {name}": quality for kind, quality in blind.items()}
    print(table(rows))
    seconds = {"encode": encoded - started, "score": time.perf_counter() - encoded}
    figures = {name: quality.by_level() for name, quality in rows.items()}
    print(json.dumps({"seconds": seconds, **figures}))
    lines = [line.strip("| ").split(" | ") for line in table(rows).splitlines()[2:]]
    records.write(
        options.record,
        columns=["partition", "level", *COLUMNS.values()],
        rows=lines,
        seeds=range(10) if any("seeds" in name for name in rows) else [0],
        figures=figures,
    )


def asked(options: argparse.Namespace) -> dict[str, list[HierarchyRecipe]]:
    named = {name: RECIPES[name] for name in options.recipes.split(",")}
    return named | (ablations() if options.ablate else {})


def table(rows: dict[str, Quality]) -> str:
    """Markdown: one row per partition and level."""
    lines = ["| | level | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, quality in rows.items():
        for level, means in enumerate(quality.by_level()):
            cells = ["–" if means.get(key) is None else f"{means[key]:.3f}" for key in COLUMNS]
            lines.append(f"| {name} | {level} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="folder, tar or listing of photos")
    parser.add_argument("--masks", type=Path, help="folder of <stem>_<k>.png")
    parser.add_argument("--encoder", default="dct")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma separated")
    parser.add_argument("--objects", help="encoder whose channels are logits of classes, 0 the background")
    parser.add_argument("--ablate", action="store_true", help="also change one field at a time")
    parser.add_argument("--limit", type=int, help="photos taken, from the first")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
