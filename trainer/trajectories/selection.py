"""A selection: the tokens of one level that an edit changes.

    H×W grid of tokens, C channels

Canvases of different levels share a grid, so tokens chosen on one level would silently fit another. A selection
therefore stores its level, and joining or applying it at another level is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hierarchy_builder.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Selection:
    """Tokens of one level. `|`, `&` and `-` combine selections, `~` inverts one."""

    mask: Tensor
    """bool [H, W] on the CPU."""
    level: int

    def __repr__(self) -> str:
        rows, columns = self.mask.shape
        return f"<Selection of {int(self.mask.sum())} of {rows}×{columns} tokens of level {self.level}>"

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise UsageError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}, expected bool [H, W]; a painted picture "
                "enters by Selection.from_painting"
            )
        if self.level < 0:
            raise UsageError(f"level {self.level}, expected 0 or more")

    @classmethod
    def from_coordinates(
        cls, coordinates: Iterable[Sequence[int]], *, grid: tuple[int, int], level: int
    ) -> Selection:
        """Select tokens at (row, column) pairs, counted from 0 at the top left. Raises UsageError outside the grid."""
        mask = torch.zeros(grid, dtype=torch.bool)
        for row, column in coordinates:
            if not (0 <= row < grid[0] and 0 <= column < grid[1]):
                raise UsageError(
                    f"token ({row}, {column}) lies outside the grid of {grid[0]} rows and {grid[1]} columns, from 0"
                )
            mask[row, column] = True
        return cls(mask=mask, level=level)

    @classmethod
    def from_painting(
        cls, painting: np.ndarray | Tensor, *, grid: tuple[int, int], level: int, share: float = 0.5
    ) -> Selection:
        """Select the tokens of which at least `share` is painted.

        painting: [h, w] of any size, painted where not 0; or [h, w, 4], painted where alpha is not 0. The whole
        painting is laid over the whole grid.
        """
        painted = torch.as_tensor(np.asarray(painting))
        if painted.ndim == 3 and painted.shape[2] == 4:
            painted = painted[..., 3]
        if painted.ndim != 2 or 0 in painted.shape:
            raise UsageError(f"painting has shape {tuple(painted.shape)}, expected [h, w] or RGBA [h, w, 4]")
        covered = F.adaptive_avg_pool2d((painted != 0).double()[None, None], grid)[0, 0]
        return cls(mask=(covered >= share) & (covered > 0), level=level)

    @classmethod
    def from_region(cls, regions: Tensor, region: int | Sequence[int], *, level: int) -> Selection:
        """Select the tokens of one region, or of several. regions: integer [H, W], ids of that level.

        Raises UsageError listing the existing ids.
        """
        wanted = [region] if isinstance(region, int) else list(region)
        there = regions.unique().tolist()
        for each in wanted:
            if each not in there:
                raise UsageError(f"level {level} has no region {each}, only {_ranges(there)}")
        return cls(mask=torch.isin(regions.cpu(), torch.tensor(wanted)), level=level)

    @classmethod
    def from_neighbours(
        cls, canvas: Tensor, token: Sequence[int], *, level: int, cosine: float = 0.9, connected: bool = False
    ) -> Selection:
        """Select the tokens whose feature has a cosine of at least `cosine` with that of the token at (row, column).

        canvas: float [H, W, C] of that level. connected: select only tokens connected to it over selected tokens, by
        their four neighbours.
        """
        if not -1 <= cosine <= 1:
            raise UsageError(f"cosine is {cosine}, expected -1 to 1, the nearer to 1 the more alike")
        start = cls.from_coordinates([token], grid=(canvas.shape[0], canvas.shape[1]), level=level)
        features = F.normalize(canvas.cpu().double(), dim=-1)
        alike = cls(mask=((features @ features[start.mask][0]) >= cosine) | start.mask, level=level)
        if not connected:
            return alike
        reached = start
        while (wider := reached.grow() & alike).count > reached.count:
            reached = wider
        return reached

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def count(self) -> int:
        """Number of selected tokens."""
        return int(self.mask.sum())

    @property
    def tokens(self) -> list[int]:
        """Row-major numbers of the selected tokens, in rising order."""
        return self.mask.flatten().nonzero()[:, 0].tolist()

    def __or__(self, other: Selection) -> Selection:
        return Selection(mask=self.mask | self._fitting(other), level=self.level)

    def __and__(self, other: Selection) -> Selection:
        return Selection(mask=self.mask & self._fitting(other), level=self.level)

    def __sub__(self, other: Selection) -> Selection:
        return Selection(mask=self.mask & ~self._fitting(other), level=self.level)

    def __invert__(self) -> Selection:
        return Selection(mask=~self.mask, level=self.level)

    def grow(self, steps: int = 1) -> Selection:
        """Add the tokens that share a side with the selection, `steps` times."""
        mask = self.mask
        for _ in range(min(steps, sum(self.grid))):  # further steps change nothing
            padded = F.pad(mask, (1, 1, 1, 1))
            mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        return Selection(mask=mask, level=self.level)

    def shrink(self, steps: int = 1) -> Selection:
        """Remove the tokens that share a side with an unselected token, `steps` times."""
        return ~(~self).grow(steps)

    def at(self, level: int) -> Selection:
        """Return a selection of the same tokens on another level."""
        return Selection(mask=self.mask, level=level)

    def require(self, grid: tuple[int, int], level: int) -> None:
        """Raise UsageError unless the selection holds tokens, and is of this grid and level."""
        if self.level != level:
            raise UsageError(
                f"the selection is of level {self.level}, the edit of level {level}: select there, or take the same "
                f"tokens with selection.at({level})"
            )
        if self.grid != grid:
            raise UsageError(f"the selection has a grid of {self.grid}, the canvas of {grid}")
        if not self.count:
            raise UsageError(
                f"nothing is selected on level {level}: click a token, paint, or name a region, then edit"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the selection as plain data."""
        return {"level": self.level, "grid": list(self.grid), "tokens": self.tokens}

    def _fitting(self, other: Selection) -> Tensor:
        if other.level != self.level:
            raise UsageError(
                f"selections of levels {self.level} and {other.level} cannot be joined: select on one level, or take "
                f"the same tokens with selection.at({self.level})"
            )
        if other.grid != self.grid:
            raise UsageError(f"selections of grids {self.grid} and {other.grid} cannot be joined")
        return other.mask


def _ranges(ids: list[int]) -> str:
    """Rising ids as text, such as `0 to 5` or `0, 2, 7`."""
    is_dense = len(ids) > 2 and ids[-1] - ids[0] == len(ids) - 1
    return f"{ids[0]} to {ids[-1]}" if is_dense else ", ".join(map(str, ids))
