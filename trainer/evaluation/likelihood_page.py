"""Where images surprise a model: maps of added bits for the report, and the list that flags odd hierarchies.

L levels (coarse → fine) or T transitions (noisy → clean), H×W grid
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hierarchy_builder.canvases.colours import hierarchy_colours
from hierarchy_builder.canvases.gallery import Gallery, LevelViewer, Section, View
from hierarchy_builder.canvases.views import REGIONS, level_names
from hierarchy_builder.files import write_bytes
from hierarchy_builder.progress import Follow
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.evaluation.evaluate import check_fits
from trainer.methods.normalizing_trajectory.likelihood import Measured, likelihood, measure
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.training.run_folder import read_kept

LIKELIHOOD = "likelihood.json"
SHOWN_IMAGES = 8
"""Images at each end of the list whose maps are shown."""
PALE, DEEP = np.array([247, 247, 244]), np.array([28, 60, 140])
"""Colours of no added bits and of the most."""
TEXT = (
    "Bits that a token adds to what the noise on it costs anyway, given its class and the level before it; darker is "
    "more surprising, all cards on one scale for each level. First the images that need the most bits, then those that "
    "need the fewest: of {count} measured. Maps by token rest on the order in which the model reads tokens; their sums "
    "do not."
)


def measure_likelihood(
    run: Path, pipe: Any, index: ShardIndex, max_real: int, num_steps: int, ema: str, follow: Follow
) -> list[dict[str, Any]]:
    """Rows name/value of `trainer evaluate --likelihood`, kept in `run` with the bits of every image.

    Arguments and errors as for `likelihood`; raises MismatchError if the shards do not fit the model.
    """
    check_fits(pipe, index)
    metrics, images = likelihood(pipe, index, max_real, num_steps, follow)
    rows = [{"name": name, "value": value} for name, value in metrics]
    setup = {"shards": index.name, "shards_hash": index.config_hash, "num_steps": num_steps, "ema": ema}
    write_likelihood(run, setup, rows, images)
    return rows


def write_likelihood(
    run: Path, setup: dict[str, Any], rows: list[dict[str, Any]], images: Sequence[Measured]
) -> None:
    """likelihood.json of a run: metrics, and the images, most surprising first, with their bits by level and region."""
    ranked = sorted(images, key=lambda image: image.added_total, reverse=True)
    listed = [
        {
            "key": image.key,
            "number": image.number,
            "added_bits": round(image.added_total, 2),
            "by_level": [round(float(bits), 2) for bits in image.added.sum(axis=(1, 2, 3))],
            "by_region": [[round(bits, 2) for bits in level] for level in image.region_bits()[:-1]],
        }
        for image in ranked
    ]
    write_bytes(run / LIKELIHOOD, json.dumps({**setup, "metrics": rows, "images": listed}).encode())


def likelihood_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows name/value of the last `trainer evaluate --likelihood`, empty before the first."""
    path = run / LIKELIHOOD
    return read_kept(path)["metrics"]


def likelihood_sections(run: Path, pipe: NormalizingPipeline, index: ShardIndex) -> list[Section]:
    """Maps of the most and the least surprising images of likelihood.json; none before it is written for these shards.

    Images are measured again, with the noise they had.
    """
    path = run / LIKELIHOOD
    content = read_kept(path)
    if content.get("shards_hash") != index.config_hash:
        return []
    listed = content["images"]
    chosen = listed if len(listed) <= 2 * SHOWN_IMAGES else listed[:SHOWN_IMAGES] + listed[-SHOWN_IMAGES:]
    images = list(measure(pipe, index, [image["number"] for image in chosen], content["num_steps"]))
    maps = [_map(image) for image in images]
    peak = np.quantile(np.stack(maps), 0.995, axis=(0, 2, 3))[:, None, None]
    cards = [
        _card(image, values / np.maximum(peak, 1e-9), index)
        for image, values in zip(images, maps, strict=True)
    ]
    text = TEXT.format(count=f"{len(listed):,}")
    return [Section(title="Surprise", text=text, blocks=[Gallery(viewers=cards, start=-1)])]


def _map(image: Measured) -> np.ndarray:
    """Added bits of tokens by level, or, where there is one level, by transition: [L or T, H, W]."""
    return image.added.sum(axis=1) if len(image.added) > 1 else image.added[0, ::-1]


def _card(image: Measured, share: np.ndarray, index: ShardIndex) -> LevelViewer:
    reader = ShardReader(index)
    stored = reader.read(image.number, extras=True).image
    reader.close()
    colours = PALE + np.sqrt(share.clip(0, 1))[..., None] * (DEEP - PALE)
    views = [View(name="added bits", layers=np.rint(colours).astype(np.uint8))]
    has_levels = len(image.added) > 1
    if has_levels:
        regions = hierarchy_colours(image.regions)
        views.insert(0, View(name=REGIONS, layers=regions))
    per_layer = _map(image).sum(axis=(1, 2))
    names = level_names(len(share)) if has_levels else [f"transition {k + 1}" for k in range(len(share))]
    return LevelViewer(
        title=index.class_names[image.label],
        subtitle=image.key,
        level_names=names,
        captions=[f"{bits:,.0f} bits" for bits in per_layer],
        views=views,
        reveal=None if stored is None else np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")),
        notes={"added bits": f"{image.added_total:,.0f}"},
    )
