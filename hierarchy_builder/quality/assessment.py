"""Score the hierarchies of a build, and their stability when a photo is flipped, shifted or rounded.

    N images, L levels (coarse → fine), H×W grid, C channels, M label maps of one image

Stability is the adjusted Rand index between two hierarchies of one photo, for each image and level. Photos are decoded
and encoded again one batch at a time, so memory does not grow with the sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from hierarchy_builder.config import ExtractConfig, HierarchyRecipe
from hierarchy_builder.encoders import Encoder, check_stored_encoder, encode, load_encoder
from hierarchy_builder.errors import BuilderError, ImageError
from hierarchy_builder.fields import from_mapping
from hierarchy_builder.hierarchy.recipe import build_hierarchy, check_nesting
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.masks import MaskFolder, open_masks
from hierarchy_builder.images.sources import Reader, open_reader
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.progress import Reporter
from hierarchy_builder.quality.report import choose_rows
from hierarchy_builder.quality.scores import (
    baselines,
    by_level,
    cells_of,
    flag_names,
    flag_shares,
    human_scores,
    join,
    mean_of,
    region_scores,
    stability,
)
from hierarchy_builder.records import FEATURE_DTYPE, FORMAT_VERSION
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import read_index
from hierarchy_builder.store.ledger import stage_entry
from hierarchy_builder.store.stored import Stored
from hierarchy_builder.store.units import finished_stage, stored_source, usable_rows

BATCH_IMAGES = 32
DECODING_THREADS = 4
NUM_SEEDS = 2
FROM_MAPS = "regions come from label maps, so their stability is not that of the features"
VIEW_SCORES = ("flip", "shift", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Views:
    """Features of four crops of the same photos, float [N, H, W, C] each.

    plain: the crop of the build, not rounded. mirrored: that crop flipped left to right. upper_left, lower_right:
    two windows of a crop that is one token larger; the second is one token further down and right.
    """

    plain: np.ndarray
    mirrored: np.ndarray
    upper_left: np.ndarray
    lower_right: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assessment:
    """The result of `assess_build`.

    rows, keys: the sampled images. scores: name → float64 [N, L−1]. violations: of the rules of region ids, int64 [N].
    flags: uint8 [N], of `Flag`. baselines: scores of partitions with as many regions that do not depend on the image.
    facts: plain data on what was scored, and on what could not be.
    """

    rows: list[int]
    keys: list[str]
    scores: Mapping[str, np.ndarray]
    violations: np.ndarray
    flags: np.ndarray
    baselines: Mapping[str, Mapping[str, np.ndarray]]
    facts: Mapping[str, Any]

    def of_image(self, number: int) -> dict[str, Any]:
        """Return all scores of one image as plain data, each a list over levels."""
        return {
            "key": self.keys[number],
            "violations": int(self.violations[number]),
            "flags": flag_names(int(self.flags[number])),
            **{
                name: [mean_of(one) for one in values[number, :, None]]
                for name, values in self.scores.items()
            },
        }

    def as_json(self) -> dict[str, Any]:
        """Return the content of quality.json."""
        return {
            "format_version": FORMAT_VERSION,
            **self.facts,
            "violations": int(self.violations.sum()),
            "levels": by_level(self.scores),
            "baselines": {name: by_level(scores) for name, scores in self.baselines.items()},
            "per_image": [self.of_image(number) for number in range(len(self.keys))],
        }


def assess_build(
    folder: BuildFolder,
    *,
    limit: int = 200,
    keys: Sequence[str] | None = None,
    masks: Path | None = None,
    reporter: Reporter | None = None,
    trust_encoder: bool = False,
) -> Assessment:
    """Score the stored hierarchies of some images of a build.

    limit: number of images, taken from all classes in turn. keys: score these images instead. masks: folder of label
    maps drawn by people, see `images.masks`. trust_encoder: load the encoder of the build even if it is a function.
    If a photo, the encoder or a label map cannot be used, the scores that need it are left out for these images;
    `facts` counts these images and says why.
    Raises BuilderError when clustering is not finished, UsageError for an unknown key or when no label map fits.
    """
    clustered = finished_stage(folder, "cluster")
    recipe = from_mapping(HierarchyRecipe, clustered["request"], str(folder.manifest))
    index = read_index(folder.index)
    rows = sorted(set(choose_rows(folder, ImageTable(index), limit, keys)))
    index = index.take(rows)
    photos = _Photos(why_not=FROM_MAPS) if recipe.masks else _open_photos(folder, trust_encoder)
    drawn = None if masks is None else _open_maps(folder, masks, index)
    stored, batches = Stored(folder), []
    with (reporter or Reporter(quiet=True)).stage("quality", len(rows)) as meter:
        for start in range(0, len(rows), BATCH_IMAGES):
            some, images = np.array(rows[start : start + BATCH_IMAGES]), index.slice(start, BATCH_IMAGES)
            batches.append(_assess_batch(stored, some, images, recipe, photos, drawn))
            meter.advance(len(images))
    scores, blind, violations = zip(*batches, strict=True)
    every = stored.rows("flags", usable_rows(folder))
    facts = {
        "cluster": clustered["hash"],
        "num_images": len(every),
        "num_sampled": len(rows),
        "flagged": flag_shares(every),
        "photos": {
            "read": photos.num_read,
            "unreadable": dict(photos.unreadable),
            "why_not": photos.why_not,
        },
        "masks": None if drawn is None else drawn.facts,
    }
    return Assessment(
        rows=rows,
        keys=index.column("key").to_pylist(),
        scores=join(scores),
        violations=np.concatenate(violations),
        flags=stored.rows("flags", np.array(rows)),
        baselines={name: join([each[name] for each in blind]) for name in blind[0]},
        facts=facts,
    )


def encode_views(encoder: Encoder, photos: Sequence[Image.Image]) -> Views:
    """Crop and encode upright RGB photos; features are float32, not rounded."""
    size_px = encoder.image_size_px
    down, right = (round(size_px / tokens) for tokens in encoder.grid)
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        crops = np.stack(list(pool.map(partial(crop_square, size_px=size_px), photos)))
        larger = np.stack(list(pool.map(partial(crop_square, size_px=size_px + max(down, right)), photos)))
    return Views(
        plain=_encode(encoder, crops),
        mirrored=_encode(encoder, crops[:, :, ::-1]),
        upper_left=_encode(encoder, larger[:, :size_px, :size_px]),
        lower_right=_encode(encoder, larger[:, down : down + size_px, right : right + size_px]),
    )


def view_scores(views: Views, regions: np.ndarray, recipe: HierarchyRecipe) -> dict[str, np.ndarray]:
    """Return the stability under four changes of the photo: float64 [N, L−1] each, named as in VIEW_SCORES.

    flip: regions of the mirrored photo, mirrored back. shift: two crops one token apart, on the tokens they share.
    float16, bfloat16: features rounded to these, compared with unrounded ones.
    regions: [N, L−1, H, W], which the recipe finds in plain features rounded to float16, as stores hold them.
    """
    upper_left = _regions_of(views.upper_left.astype(FEATURE_DTYPE), recipe)
    lower_right = _regions_of(views.lower_right.astype(FEATURE_DTYPE), recipe)
    mirrored = _regions_of(views.mirrored.astype(FEATURE_DTYPE), recipe)
    plain = views.plain.astype(np.float32)
    unrounded = _regions_of(plain, recipe)
    bfloat16 = _regions_of(torch.from_numpy(plain).bfloat16().float().numpy(), recipe)
    scores = (
        stability(regions, mirrored[..., ::-1]),
        stability(upper_left[..., 1:, 1:], lower_right[..., :-1, :-1]),
        stability(unrounded, regions),
        stability(unrounded, bfloat16),
    )
    return dict(zip(VIEW_SCORES, scores, strict=True))


def seed_scores(
    features: np.ndarray, regions: np.ndarray, recipe: HierarchyRecipe, num_seeds: int = 1
) -> np.ndarray:
    """Return the mean stability over the next `num_seeds` seeds: float64 [N, L−1]; 1 where the recipe draws nothing.

    features: float16 [N, H, W, C]. regions: those that the recipe finds in them.
    """
    seeds = [(recipe.seed + number) % 2**32 for number in range(1, num_seeds + 1)]
    found = [stability(regions, _regions_of(features, replace(recipe, seed=seed))) for seed in seeds]
    return np.mean(found, axis=0)


@dataclass(kw_only=True, slots=True)
class _Photos:
    """The photos of a build and its encoder; without one of them `why_not` says why."""

    encoder: Encoder | None = None
    reader: Reader | None = None
    max_pixels: int = 0
    why_not: str = ""
    num_read: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)

    def views(self, paths: Sequence[str]) -> tuple[np.ndarray, Views | None]:
        """Read and encode photos; returns which of them could be read (bool [n]) and the views of these."""
        if self.encoder is None:
            return np.zeros(len(paths), dtype=bool), None
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            found = list(pool.map(self._read, paths))
        photos = [photo for photo in found if not isinstance(photo, ImageError)]
        self.num_read += len(photos)
        self.unreadable.update(error.reason for error in found if isinstance(error, ImageError))
        seen = np.array([not isinstance(photo, ImageError) for photo in found])
        return seen, encode_views(self.encoder, photos) if photos else None

    def _read(self, path: str) -> Image.Image | ImageError:
        assert self.reader is not None
        try:
            return decode_image(self.reader.read(path), max_pixels=self.max_pixels)[0]
        except ImageError as error:
            return error


@dataclass(kw_only=True, slots=True)
class _LabelMaps:
    """The label maps that people drew of the photos of a build. facts: what of them was read, and what was refused."""

    masks: MaskFolder
    image_size_px: int
    cells: tuple[int, int]
    facts: dict[str, Any] = field(default_factory=lambda: {"images": 0, "maps": 0, "refused": []})

    def read(self, images: pa.Table) -> list[np.ndarray]:
        """Return the maps of each row of the index, int64 [M, h, w]."""
        columns = (images.column(name).to_pylist() for name in ("path", "width", "height"))
        found = []
        for path, width, height in zip(*columns, strict=True):
            maps, refused = self.masks.read(path, (width, height), self.image_size_px, self.cells)
            self.facts["images"] += bool(len(maps))
            self.facts["maps"] += len(maps)
            self.facts["refused"] += map(str, refused)
            found.append(maps)
        return found


def _assess_batch(
    stored: Stored,
    rows: np.ndarray,
    images: pa.Table,
    recipe: HierarchyRecipe,
    photos: _Photos,
    drawn: _LabelMaps | None,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Return the scores of some images, those of the baselines, and the violations."""
    features, regions = stored.rows("features", rows), stored.rows("regions", rows)
    humans = None if drawn is None else drawn.read(images)
    seen, views = photos.views(images.column("path").to_pylist())
    scores = region_scores(features, regions)
    scores |= {name: np.full(regions.shape[:2], np.nan) for name in ("seed", *VIEW_SCORES)}
    if not recipe.masks:
        scores["seed"] = seed_scores(features, regions, recipe, NUM_SEEDS)
    if views is not None:
        for name, values in view_scores(views, regions[seen], recipe).items():
            scores[name][seen] = values
    if humans is not None:
        scores |= human_scores(regions, humans)
    blind = baselines(features, scores["regions"], humans, seed=int(rows[0]))
    return scores, blind, check_nesting(regions)


def _open_photos(folder: BuildFolder, trust_encoder: bool) -> _Photos:
    """Open the encoder and the photos of a build, if they still exist."""
    extracted = stage_entry(folder, "extract")
    config = from_mapping(ExtractConfig, extracted["request"], str(folder.manifest))
    try:
        check_stored_encoder(config.encoder, folder.root, trusted=trust_encoder)
        encoder = load_encoder(config.encoder, weights=config.weights, precision=config.precision)
        if encoder.weights_hash != extracted["inputs"]["encoder"]["weights_hash"]:
            return _Photos(
                why_not=f"encoder {encoder.name} has other weights now than when the build was made"
            )
        reader = open_reader(stored_source(folder))
        return _Photos(encoder=encoder, reader=reader, max_pixels=config.max_pixels)
    except (BuilderError, OSError) as error:
        return _Photos(why_not=str(error))


def _open_maps(folder: BuildFolder, masks: Path, index: pa.Table) -> _LabelMaps:
    opened = open_masks(masks)
    opened.check_photos(index.column("path").to_pylist())
    encoder = stage_entry(folder, "extract")["inputs"]["encoder"]
    return _LabelMaps(masks=opened, image_size_px=encoder["image_size_px"], cells=cells_of(encoder["grid"]))


def _regions_of(features: np.ndarray, recipe: HierarchyRecipe) -> np.ndarray:
    return build_hierarchy(features, recipe).regions


def _encode(encoder: Encoder, crops: np.ndarray) -> np.ndarray:
    batches = (crops[start : start + BATCH_IMAGES] for start in range(0, len(crops), BATCH_IMAGES))
    return np.concatenate([encode(encoder, np.ascontiguousarray(batch)) for batch in batches])
