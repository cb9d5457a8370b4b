"""Recipes against a regular grid, random partitions and people's label maps, in one run without a build.

    python -m benchmarks.builder.recipes IMAGES --masks LABELS --encoder onnx:FILE --recipes paper,stable --ablate

Every photo is encoded four times (plain, mirrored, two crops one token apart), once for all recipes. The table has
one row per partition and level; grids and random partitions have as many regions as their recipe, image by image.
`paper-seeds` is the mean of ten seeds; --ablate adds `stable` with each field in turn as in `paper`. --objects names a
segmentation model whose class 0 is background: object IoU is then measured against what it calls object. Differences
of `stable` and `paper-seeds` are paired photo by photo, ± standard error of their mean, also with the trees of `paper`
cut into as many regions as `stable` has. Adjusted Rand indices: flip, shift, seed, bf16. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import records
from hierarchy_builder.config import HierarchyRecipe
from hierarchy_builder.encoders import Encoder, encode, load_encoder
from hierarchy_builder.hierarchy.recipe import build_hierarchy, cut_levels
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.quality.assessment import NUM_SEEDS, Views, encode_views, seed_scores, view_scores
from hierarchy_builder.quality.scores import baselines, by_level, cells_of, human_scores, region_scores
from hierarchy_builder.records import FEATURE_DTYPE

Scores = dict[str, np.ndarray]
"""By name, float64 [N, L−1]."""
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
    images: str, masks: Path | None, encoder: Encoder, taken: slice = slice(None)
) -> tuple[Views, list[np.ndarray] | None]:
    """Views of the photos of a folder and, for each, people's label maps int64 [M, h, w]."""
    source = open_source(images)
    paths = [record.path for record in source.records[taken]]
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
) -> Scores:
    """All scores of one recipe."""
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
    return scores


def ablations() -> dict[str, list[HierarchyRecipe]]:
    """`stable` with each field in which the two recipes differ as in `paper`."""
    fields = [field.name for field in dataclasses.fields(HierarchyRecipe)]
    differing = [name for name in fields if getattr(PAPER, name) != getattr(STABLE, name)]
    return {
        f"stable without {name}": [dataclasses.replace(STABLE, **{name: getattr(PAPER, name)})]
        for name in differing
    }


def mean_scores(found: list[Scores]) -> Scores:
    """Scores averaged image by image over recipes."""
    return {name: np.mean([scores[name] for scores in found], axis=0) for name in found[0]}


def predicted_objects(
    name: str, images: str, cells: tuple[int, int], taken: slice = slice(None)
) -> list[np.ndarray]:
    """What a segmentation model calls object in each photo, int64 [1, h, w]; nothing where that is < 5 % or > 90 %.

    The model sees photos at its own size. Both it and the encoder crop the central square, so that a cell of `cells`,
    those of the encoder, takes the class that the model gives to the place of its centre.
    """
    model, source = load_encoder(name), open_source(images)
    photos = [decode_image(source.read(record.path))[0] for record in source.records[taken]]
    crops = np.stack([crop_square(photo, model.image_size_px) for photo in photos])
    logits = np.concatenate([encode(model, crops[start : start + 16]) for start in range(0, len(crops), 16)])
    rows, columns = (
        (2 * np.arange(number) + 1) * tokens // (2 * number)
        for number, tokens in zip(cells, model.grid, strict=True)
    )
    maps = (logits.argmax(axis=-1) != 0).astype(np.int64)[:, rows[:, None], columns]
    return [found[None] if 0.05 < found.mean() < 0.9 else found[None][:0] for found in maps]


def with_as_many(views: Views, recipe: HierarchyRecipe, counts: np.ndarray) -> np.ndarray:
    """Regions of a recipe whose trees are cut, image by image, where as many are left as `counts` [N, L−1] says.

    A tree that has fewer tokens than that gives one region to each token of its object.
    """
    found = build_hierarchy(views.plain.astype(FEATURE_DTYPE), recipe)
    levels = []
    for regions, merges, wanted in zip(found.regions, found.merges, counts.astype(np.int64), strict=True):
        heights = merges[merges[:, 0] >= 0, 2].astype(np.float64)
        at = [heights.size - max(int(number) - 2, 0) for number in wanted[1:]]  # merges that are kept
        limits = np.concatenate([[-np.inf], (heights[1:] + heights[:-1]) / 2, [np.inf]])
        span = np.ptp(heights) + 1e-8 if heights.size else 1.0
        lowest = heights.min() if heights.size else 0.0
        cuts = [min((limits[max(kept, 0)] - lowest) / span, 1.0) for kept in at]  # 1 keeps every merge
        levels.append(cut_levels(regions[None, 0], merges[None], cuts)[0])
    return np.stack(levels)


def difference(ours: Scores, theirs: Scores) -> list[list[str]]:
    """Mean over photos of the paired difference of each column, ± its standard error; one list per level."""
    levels = []
    for level in range(ours["regions"].shape[1]):
        cells = []
        for key in COLUMNS:
            if key not in ours or key not in theirs:
                cells.append("–")
                continue
            gap = (ours[key] - theirs[key])[:, level].astype(np.float64)
            gap = gap[np.isfinite(gap)]
            error = gap.std(ddof=1) / np.sqrt(gap.size) if gap.size > 1 else 0.0
            cells.append(f"{gap.mean():+.3f} ± {error:.3f}" if gap.size > 1 else "–")
        levels.append(cells)
    return levels


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if unknown := set(options.recipes.split(",")) - RECIPES.keys():
        parser.error(f"unknown recipes {', '.join(unknown)}: known are {', '.join(RECIPES)}")
    started = time.perf_counter()
    encoder = load_encoder(options.encoder)
    views, humans = load_photos(options.images, options.masks, encoder, options.slice)
    encoded = time.perf_counter()
    rows = {}
    objects = None
    if options.objects:
        cells = cells_of(encoder.grid)
        objects = predicted_objects(options.objects, options.images, cells, options.slice)
        print(f"{sum(map(len, objects))} photos with an object", file=sys.stderr)
    for name, recipes in asked(options).items():
        rows[name] = mean_scores([score_recipe(views, recipe, humans, objects) for recipe in recipes])
        if len(recipes) > 1 or name not in RECIPES:
            continue
        counts = rows[name]["regions"]
        blind = baselines(views.plain, counts, humans)
        if objects is not None:
            seen = baselines(views.plain, counts, objects)
            for kind, scores in blind.items():
                scores["object_iou"] = seen[kind]["object_iou"]
        rows |= {f"{kind} as {name}": scores for kind, scores in blind.items()}
    gaps = {}
    if {"stable", "paper-seeds"} <= rows.keys():
        gaps["stable − paper-seeds"] = difference(rows["stable"], rows["paper-seeds"])
        if humans is not None:
            counts = rows["stable"]["regions"]
            equal = [
                human_scores(with_as_many(views, recipe, counts), humans) for recipe in RECIPES["paper-seeds"]
            ]
            as_many = {"regions": counts} | mean_scores(equal)
            if objects is not None:
                as_many["object_iou"] = rows["paper-seeds"]["object_iou"]
            rows["paper-seeds, as many regions as stable"] = as_many
            gaps["stable − paper-seeds, equal counts"] = difference(rows["stable"], as_many)
    shown = table(rows, gaps)
    print(shown)
    seconds = {"encode": encoded - started, "score": time.perf_counter() - encoded}
    figures = {name: by_level(scores) for name, scores in rows.items()}
    print(json.dumps({"seconds": seconds, **figures}))
    lines = [line.strip("| ").split(" | ") for line in shown.splitlines()[2:]]
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


def table(rows: dict[str, Scores], gaps: dict[str, list[list[str]]]) -> str:
    """Markdown: one row per partition and level, then one per difference and level."""
    lines = ["| | level | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, scores in rows.items():
        for level, means in enumerate(by_level(scores)):
            cells = ["–" if means.get(key) is None else f"{means[key]:.3f}" for key in COLUMNS]
            lines.append(f"| {name} | {level} | " + " | ".join(cells) + " |")
    for name, levels in gaps.items():
        lines += [f"| {name} | {level} | {' | '.join(cells)} |" for level, cells in enumerate(levels)]
    return "\n".join(lines)


def slice_of(text: str) -> slice:
    """`start:stop:step` as a slice; ValueError for anything else."""
    start, stop, step = ([int(part) if part else None for part in text.split(":")] + [None, None])[:3]
    return slice(start, stop, step)


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
    parser.add_argument(
        "--slice", type=slice_of, default=slice(None), help="photos taken, as in Python: 1::2, every second"
    )
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
