"""Draws the README's picture of teacher hierarchies, from photographs that scikit-image and scikit-learn ship.

    python docs/draw_teachers.py --encoder timm:vit_small_patch14_dinov2 --weights dinov2_small.safetensors

A column is a photograph. Below it are the four levels of its hierarchy by the recipe `paper`: the object, with the
background greyed out; parts and subparts, coloured so that children resemble their parent; and the tokens, whose three
main directions over all photographs are red, green and blue. The encoder sees the middle square of each photograph.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from hierarchy_builder.canvases.colours import fit_palette, hierarchy_colours
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.hierarchy import build_hierarchy
from hierarchy_builder.images.decoding import crop_square

PHOTOGRAPHS = (
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/camera.png"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
)
ROWS = ("photograph", "0: object / background", "1: parts", "2: subparts", "3: tokens")
SIDE_PX, GAP_PX, TEXT_PX = 176, 4, 20
VEIL = 0.14
"""Share of the photograph that is left in the background of level 0."""
INK = (27, 31, 59)


def main(
    encoder: Annotated[str, typer.Option(help="Name of an encoder.")] = "timm:vit_small_patch14_dinov2",
    weights: Annotated[str | None, typer.Option(help="Its weight file; by default from the hub.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("docs/images/teachers.png"),
) -> None:
    """Photographs → hierarchies → one picture."""
    found = load_encoder(encoder, weights=weights, device="cpu")
    crops = [crop_square(photograph(*source), found.image_size_px) for source in PHOTOGRAPHS]
    features = np.concatenate([found.encode(crop[None]) for crop in crops]).astype(np.float16)
    regions = build_hierarchy(features).regions
    palette = fit_palette(features)
    columns = [
        [Image.fromarray(crop), cut_out(crop, levels[0]), *regions_of(levels), token_colours]
        for crop, levels, token_colours in zip(
            crops, regions, map(Image.fromarray, palette.apply(features)), strict=True
        )
    ]
    sheet(columns).save(out, optimize=True)


def photograph(package: str, file: str) -> Image.Image:
    """A photograph that a package ships."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    return Image.open(folder / file).convert("RGB")


def cut_out(crop: np.ndarray, level_HW: np.ndarray) -> Image.Image:
    """The object of level 0 as in the photograph, and the background almost white."""
    inside = np.asarray(Image.fromarray((level_HW > 0).astype(np.uint8)).resize(crop.shape[1::-1], 0))[
        ..., None
    ]
    return Image.fromarray(np.where(inside, crop, VEIL * crop + (1 - VEIL) * 244).astype(np.uint8))


def regions_of(levels: np.ndarray) -> list[Image.Image]:
    """Colours of the regions of levels 1 and 2."""
    return [Image.fromarray(level) for level in hierarchy_colours(levels)[1:-1]]


def sheet(columns: list[list[Image.Image]]) -> Image.Image:
    """All pictures in columns, with the name of the level above each row."""
    step = SIDE_PX + GAP_PX
    page = Image.new("RGB", (len(columns) * step - GAP_PX, len(ROWS) * (step + TEXT_PX) - GAP_PX), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for row, name in enumerate(ROWS):
        top = row * (step + TEXT_PX)
        draw.text((0, top), name, fill=INK, font=font)
        for column, pictures in enumerate(columns):
            picture = pictures[row]
            smooth = picture.width > SIDE_PX
            size, how = (SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
            page.paste(picture.resize(size, how), (column * step, top + TEXT_PX))
    return page


if __name__ == "__main__":
    typer.run(main)
