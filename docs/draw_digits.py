"""Draw docs/images/digits.png: samples of the demo's network, ten classes and four seeds.

make demo
python docs/draw_digits.py runs/demo/run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer import TrajectoryPipeline

TARGET = Path(__file__).parent / "images" / "digits.png"
SEEDS = 4
SIDE_PX, GAP_PX, LINE_PX = 84, 8, 24
LEVELS = {
    0: "level 0, object/background: one network evaluation from noise",
    -1: "level 3, tokens: three levels later",
}
INK = (16, 24, 64)


def drawn(pipe: TrajectoryPipeline, target: Path) -> None:
    """Write the picture: for each of two levels a line of text, and rows of seeds with columns of classes."""
    step = SIDE_PX + GAP_PX
    width, height = GAP_PX + step * len(pipe.class_names), LINE_PX + step * SEEDS
    picture = Image.new("RGB", (width, height * len(LEVELS)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for part, text in enumerate(LEVELS.values()):
        pen.text((GAP_PX, part * height + 4), text, fill=INK, font=font)
    for column, label in enumerate(pipe.class_names):
        for seed in range(SEEDS):
            pictures = pipe(label, seed=seed).decode()
            for part, level in enumerate(LEVELS):
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
    parser.add_argument("run", help="Run folder of `make demo`.")
    drawn(TrajectoryPipeline.from_pretrained(parser.parse_args().run), TARGET)


if __name__ == "__main__":
    main()
