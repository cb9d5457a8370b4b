"""One picture of a whole trajectory, which also maps a pixel back to the level and token drawn there.

    L levels (coarse → fine), H×W grid of tokens, h×w pixels

Columns are levels; rows are regions, latent colours and decoded pictures. Selected tokens keep their colours within a
double outline; the other tokens of that level are dimmed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from hierarchy_builder.canvases.colours import hierarchy_colours
from hierarchy_builder.canvases.views import latent_views, level_names, shared_palette
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory
from trainer.trajectories.view import INK, PAPER, tile

CELL_PX, GAP_PX, HEADER_PX, LINE_PX = 232, 10, 32, 2
DIMMED = 0.4
"""Weight of a token's own colour outside the selection; the rest is the background colour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """A drawn board and its layout."""

    picture: np.ndarray
    """uint8 [h, w, 3]."""
    num_levels: int
    num_rows: int
    grid: tuple[int, int]

    def place(self, x: float, y: float) -> tuple[int, int, int] | None:
        """Level, row and column of the token at a pixel, None between the cells."""
        level, across = divmod(x, CELL_PX + GAP_PX)
        view, down = divmod(y - HEADER_PX, CELL_PX + GAP_PX)
        inside = 0 <= level < self.num_levels and 0 <= view < self.num_rows
        if not inside or across >= CELL_PX or down >= CELL_PX:
            return None
        height, width = self.grid
        return int(level), int(down * height / CELL_PX), int(across * width / CELL_PX)

    def cell(self, level: int) -> np.ndarray:
        """The lowest picture of a level, uint8 [h, w, 3]: decoded where there is a decoder."""
        step = CELL_PX + GAP_PX
        x, y = level * step, HEADER_PX + (self.num_rows - 1) * step
        return self.picture[y : y + CELL_PX, x : x + CELL_PX]


def draw_board(
    trajectory: Trajectory, selection: Selection | None = None, like: Trajectory | None = None
) -> Board:
    """Draw all levels of a trajectory.

    like: trajectory whose tokens define the colours of features, by default the drawn one; all boards of one sequence
    of edits use the same.
    """
    cells = [list(row) for row in _cells(trajectory, like or trajectory)]
    if selection is not None and selection.count:
        for row in cells:
            row[selection.level] = _marked(row[selection.level], selection.mask.numpy())
    return _assembled(cells, level_names(trajectory.num_levels), trajectory.grid)


@functools.lru_cache(maxsize=16)
def _cells(trajectory: Trajectory, like: Trajectory) -> tuple[tuple[np.ndarray, ...], ...]:
    """Rows of pictures without the selection, cached so that a click does not decode again."""
    decoded = trajectory.decode() if trajectory.can_decode else None
    palette = shared_palette([like.levels[-1].numpy()])
    views = latent_views(trajectory.levels.numpy(), decoded, palette)
    count = trajectory.num_levels
    colours = hierarchy_colours(trajectory.regions()[: max(1, count - 1)].numpy())[-count:]
    return tuple(
        tuple(np.array(tile(picture, CELL_PX)) for picture in layers)
        for layers in (colours, *(view.layers for view in views))
    )


def _assembled(cells: list[list[np.ndarray]], names: tuple[str, ...], grid: tuple[int, int]) -> Board:
    step, levels = CELL_PX + GAP_PX, len(cells[0])
    sheet = Image.new("RGB", (levels * step - GAP_PX, HEADER_PX + len(cells) * step - GAP_PX), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for level, name in enumerate(names):
        draw.text((level * step, 2), f"{level}  {name}", INK, font=font)
        for row, pictures in enumerate(cells):
            sheet.paste(Image.fromarray(pictures[level]), (level * step, HEADER_PX + row * step))
    return Board(picture=np.asarray(sheet), num_levels=levels, num_rows=len(cells), grid=grid)


def _marked(cell: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Dim the tokens outside the mask, and draw a dark line outside and a light line inside its border."""
    chosen = np.array(Image.fromarray(mask).resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST))
    dimmed = np.rint(DIMMED * cell + (1 - DIMMED) * np.array(PAPER)).astype(np.uint8)
    marked = np.where(chosen[..., None], cell, dimmed)
    for inside, colour in ((~chosen, INK), (chosen, PAPER)):
        marked[inside & ~binary_erosion(inside, iterations=LINE_PX, border_value=1)] = colour
    return marked
