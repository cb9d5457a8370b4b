"""Comparison of two trajectories, level by level, in numbers and as a picture.

L levels (coarse → fine), H×W grid of tokens, C channels, h×w pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.canvases.views import level_names, shared_palette
from hierarchy_builder.errors import UsageError
from trainer.metrics.edit_locality import decoded_locality, effectiveness, latent_invariance, token_change
from trainer.trajectories.edit import Source
from trainer.trajectories.selection import Selection
from trainer.trajectories.trajectory import Trajectory
from trainer.trajectories.view import CELL_PX, GAP_PX, INK, PAPER, tile

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, h, w, 3] → float [B, H, W, C]: the encoder in whose features decoded pictures are compared."""
CHANGED = 1e-3
"""1 − cos above which a token counts as changed; rounding and batch sizes cause smaller differences."""
HEADER_PX, SIDE_PX, SCALE_PX = 26, 128, 40
HEAT = np.array(
    [(12, 12, 40), (96, 28, 110), (214, 72, 66), (252, 190, 72), (255, 252, 220)], dtype=np.float64
)


def edited_tokens(after: Trajectory, before: Trajectory | None = None) -> Selection | None:
    """Return the tokens that edits of `after` changed on the coarsest edited level; None without edits.

    before: the trajectory that `after` was made from; the edits of `before` itself are ignored.
    """
    earlier = [] if before is None else before.history
    skipped = len(earlier) if after.history[: len(earlier)] == earlier else 0
    edits = [entry for entry in after.history[skipped:] if entry.get("edit") in ("features", "shape")]
    if not edits:
        return None
    level = min(entry["level"] for entry in edits)
    mask = torch.zeros(after.grid, dtype=torch.bool)
    for entry in edits:
        if entry["level"] == level:
            mask.view(-1)[torch.tensor(entry["tokens"])] = True
    return Selection(mask=mask, level=level)


def compare(
    before: Trajectory,
    after: Trajectory,
    selection: Selection | None = None,
    encode: Encode | None = None,
) -> list[dict[str, Any]]:
    """Return one row for each level: how far the two trajectories are apart.

    selection: the edited tokens, for LIS and for the changes inside and outside them from its level on; None takes
    them from the history of `after`. encode: see `encoder_of`. Missing numbers are NaN. Raises UsageError if levels,
    grid or channels differ.
    """
    if before.levels.shape != after.levels.shape:
        raise UsageError(
            f"trajectories have levels {tuple(before.levels.shape)} and {tuple(after.levels.shape)}: only those of one "
            "model can be compared"
        )
    change = token_change(before.levels, after.levels)
    rows = [
        {
            "level": level,
            "equal": torch.equal(before.levels[level], after.levels[level]),
            "change": float(change[level].mean()),
            "changed_share": float((change[level] > CHANGED).double().mean()),
            "largest": float((before.levels[level] - after.levels[level]).abs().max()),
        }
        for level in range(before.num_levels)
    ]
    selection = edited_tokens(after, before) if selection is None else selection
    found = {} if selection is None else locality(before, after, selection, encode=encode)
    names = next(iter(found.values()), {})
    nothing = dict.fromkeys(names, math.nan)
    return [{**row, **found.get(level, nothing)} for level, row in enumerate(rows)]


def by_measure(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Transpose rows of `compare`: a row for each measure, a column for each level; all-NaN rows are dropped."""
    return [
        {"measure": name, **{f"level {row['level']}": row[name] for row in rows}}
        for name in rows[0]
        if name != "level" and not all(math.isnan(row[name]) for row in rows)
    ]


def locality(
    before: Trajectory,
    after: Trajectory,
    selection: Selection,
    source: Source | None = None,
    encode: Encode | None = None,
) -> dict[int, dict[str, float]]:
    """Return LIS, the effect inside and distances of decoded pictures, for the selection's level and later ones.

    docs/metrics.md defines them.
    """
    args = selection.mask, selection.level
    scores = latent_invariance(before.levels, after.levels, *args)
    wanted = before.levels[selection.level, selection.mask] if source is None else source.over(selection)
    effects = effectiveness(before.levels, after.levels, wanted, *args)
    decoded = {}
    if before.can_decode and after.can_decode:
        decoded = decoded_locality(before.decode(), after.decode(), *args, encode)
    found = {}
    for level, lis in scores.items():
        effect = effects[level]._asdict()
        if source is None:
            effect = {"change": effect["change"], "gain": math.nan, "reached": math.nan}
        found[level] = {"lis": lis, "inside": effect.pop("change"), **effect}
        found[level] |= decoded[level]._asdict() if decoded else {}
    return found


def encoder_of(trajectory: Trajectory) -> Encode | None:
    """Return the encoder of the levels if it needs no weights (`dct`), else None."""
    spec = trajectory.encoder.get("decoder")
    if not isinstance(spec, dict) or spec.get("kind") != "dct":
        return None
    basis = DctBasis.from_spec(spec)

    side = trajectory.encoder.get("image_size_px")

    def encode(pictures: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        if side is not None and tuple(images.shape[2:]) != (side, side):  # drawn by a pixel stage
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return basis(images).numpy()

    return encode


def heat_map(change: np.ndarray, most: float) -> np.ndarray:
    """Turn 1 − cos into colours: float [...] → uint8 [..., 3], dark at 0, light at `most`."""
    position = change / max(most, 1e-12) * (len(HEAT) - 1)
    colours = [np.interp(position, range(len(HEAT)), channel) for channel in HEAT.T]
    return np.rint(np.stack(colours, axis=-1)).astype(np.uint8)


def comparison_png(before: Trajectory, after: Trajectory) -> Image.Image:
    """Draw a sheet: columns are levels; rows are the canvases before and after, the change, and decoded pictures.

    Canvases share one palette; the change is 1 − cos of each token, and a bar below states its scale.
    """
    change = token_change(before.levels, after.levels).numpy()
    palette = shared_palette([before.levels.numpy(), after.levels.numpy()])
    rows: list[tuple[str, np.ndarray]] = []
    if palette is not None:
        rows += [
            ("canvas before", palette.apply(before.levels.numpy())),
            ("canvas after", palette.apply(after.levels.numpy())),
        ]
    most = float(change.max())
    rows.append(("change of tokens", heat_map(change, most)))
    if before.can_decode and after.can_decode:
        rows += [("picture before", before.decode()), ("picture after", after.decode())]
    names = level_names(before.num_levels)
    step = CELL_PX + GAP_PX
    sheet = Image.new("RGB", (SIDE_PX + len(names) * step, HEADER_PX + len(rows) * step + SCALE_PX), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for level, name in enumerate(names):
        draw.text((SIDE_PX + level * step, GAP_PX), name, INK, font=font)
    for number, (name, pictures) in enumerate(rows):
        draw.text((GAP_PX, HEADER_PX + number * step + CELL_PX // 2 - 8), name, INK, font=font)
        for level, picture in enumerate(pictures):
            sheet.paste(tile(picture), (SIDE_PX + level * step, HEADER_PX + number * step))
    _draw_scale(sheet, most, HEADER_PX + len(rows) * step + GAP_PX)
    return sheet


def _draw_scale(sheet: Image.Image, most: float, top: int) -> None:
    """State below the pictures what the colours of the change mean."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    right = SIDE_PX + CELL_PX
    bar = heat_map(np.tile(np.linspace(0, 1, CELL_PX), (12, 1)), 1.0)
    draw.text((GAP_PX, top), "scale of change", INK, font=font)
    sheet.paste(Image.fromarray(bar), (SIDE_PX, top + 2))
    draw.text((SIDE_PX, top + 16), "0", INK, font=font)
    if most > 0:
        draw.text((right, top + 16), f"{most:.3g}", INK, font=font, anchor="ra")
        unit = "1 - cosine"
    else:
        unit = "1 - cosine; nothing changed"
    draw.text((right + 2 * GAP_PX, top), unit, INK, font=font)
