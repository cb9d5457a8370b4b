"""Draw samples of a network of the demo's digits, ten classes and four seeds.

make demo
python docs/draw_digits.py runs/demo/run --temperature 0.8          # docs/images/digits.png
python docs/draw_digits.py RUN --guidance 2 --name digits_latent    # RUN of another method
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer import TrajectoryPipeline

IMAGES = Path(__file__).parent / "images"
SEEDS = 4
SIDE_PX, GAP_PX, LINE_PX = 84, 8, 24
LEVELS = {
    0: "level 0, object/background: one network evaluation from noise",
    -1: "level 3, tokens: three levels later",
}
"""Lines over the rows of a method that draws levels."""
INK = (16, 24, 64)


def drawn(pipe: TrajectoryPipeline, target: Path, title: str, **how: Any) -> None:
    """Write the picture: for one or two levels a line of text, and rows of seeds with columns of classes."""
    labels = pipe.class_names
    samples = [[pipe(label, seed=seed, **how).decode() for label in labels] for seed in range(SEEDS)]
    levels = LEVELS if len(samples[0][0]) > 1 else {0: title}
    step = SIDE_PX + GAP_PX
    width, height = GAP_PX + step * len(labels), LINE_PX + step * SEEDS
    picture = Image.new("RGB", (width, height * len(levels)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for part, (level, text) in enumerate(levels.items()):
        pen.text((GAP_PX, part * height + 4), text, fill=INK, font=font)
        for seed, row in enumerate(samples):
            for column, pictures in enumerate(row):
                tile = Image.fromarray(np.asarray(pictures[level])).resize(
                    (SIDE_PX, SIDE_PX), Image.Resampling.BOX
                )
                picture.paste(tile, (GAP_PX + column * step, part * height + LINE_PX + seed * step))
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="Run folder, for example of `make demo`.")
    parser.add_argument("--guidance", type=float, help="Guidance scale. Default: none.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Factor of the noise. Default: 1.")
    parser.add_argument("--name", default="digits", help="Name of the picture in docs/images.")
    parser.add_argument("--title", default="", help="Line over the samples of a method without levels.")
    options = parser.parse_args()
    pipe = TrajectoryPipeline.from_pretrained(options.run)
    how = {"guidance": options.guidance, "temperature": options.temperature}
    drawn(pipe, IMAGES / f"{options.name}.png", options.title, **how)


if __name__ == "__main__":
    main()
