"""How local and how effective an edit is: it should change the edited tokens and no others.

    L levels (coarse → fine), ℓ* edited level, H×W grid of tokens, C channels, E edited tokens, h×w pixels

Before and after are trajectories drawn from the same noise, of which the second was edited at ℓ*. Definitions, sources
and deviations: docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hierarchy_builder.errors import UsageError


class Effect(NamedTuple):
    """Effect of an edit on the edited tokens of one level."""

    change: float
    """Mean 1 − cos between before and after."""
    gain: float
    """Increase of the mean cosine with the source."""
    reached: float
    """Relative decrease of the distance 1 − cos to the source: 1 at the source, below 0 further away than before."""


class DecodedLocality(NamedTuple):
    """Mean distance of two decoded pictures, inside and outside the edited tokens' squares."""

    pixel_inside: float
    pixel_outside: float
    """Mean absolute difference of RGB in [0, 1]."""
    feature_inside: float
    feature_outside: float
    """Mean 1 − cos of the tokens of the re-encoded pictures; NaN without an encoder."""


def latent_invariance(before: Any, after: Any, edited_mask: Any, edit_level: int) -> dict[int, float]:
    """LIS(ℓ* → ℓ): mean 1 − cos over the tokens that were not edited, for every ℓ ≥ ℓ*; lower is more local.

    before, after: float [L, H, W, C], tensors or arrays. edited_mask: bool [H, W]. edit_level: ℓ*.
    Equal tokens give exactly 0; if all tokens are edited, the result is NaN.
    Raises UsageError if shapes or level do not fit.
    Source: Trajectory Forcing (arXiv 2606.22527), locality and invariance score.
    """
    change, mask = token_change(before, after), _mask(edited_mask, before, edit_level)
    return {level: _mean(change[level, ~mask]) for level in range(edit_level, len(change))}


def token_change(before: Any, after: Any) -> Tensor:
    """1 − cos of every token of every level, float64 [L, H, W]; 0 for equal tokens, 1 if one of them is zero.

    before, after: float [L, H, W, C].
    """
    before, after = _float64(before), _float64(after)
    if before.shape != after.shape or before.ndim != 4:
        raise UsageError(
            f"trajectories have shapes {tuple(before.shape)} and {tuple(after.shape)}, expected equal ones [L, H, W, C]"
        )
    return cosine_distance(before, after)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos along the last axis, as ½‖â − b̂‖², which is exactly 0 where a = b."""
    distance = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(dim=-1) / 2
    is_zero_a, is_zero_b = (a == 0).all(dim=-1), (b == 0).all(dim=-1)
    return torch.where(is_zero_a ^ is_zero_b, 1.0, distance)


def effectiveness(
    before: Any, after: Any, source: Any, edited_mask: Any, edit_level: int
) -> dict[int, Effect]:
    """Effect of an edit on the edited tokens, for every level ℓ ≥ ℓ*.

    before, after: float [L, H, W, C]. source: float [C], or [E, C] for each edited token in row-major order: the
    inserted features. `reached` is NaN if the tokens were equal to the source before.
    """
    change, mask = token_change(before, after), _mask(edited_mask, before, edit_level)
    wanted = _float64(source)
    effects = {}
    for level in range(edit_level, len(change)):
        distances = [
            _mean(cosine_distance(_float64(levels)[level, mask], wanted)) for levels in (before, after)
        ]
        reached = 1 - distances[1] / distances[0] if distances[0] > 0 else math.nan
        effects[level] = Effect(_mean(change[level, mask]), distances[0] - distances[1], reached)
    return effects


def decoded_locality(
    before: np.ndarray,
    after: np.ndarray,
    edited_mask: Any,
    edit_level: int,
    encode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[int, DecodedLocality]:
    """Locality of an edit in the decoded pictures of levels ℓ ≥ ℓ*.

    before, after: uint8 [L, h, w, 3]; h and w are multiples of H and W. edited_mask: bool [H, W].
    encode: uint8 [B, h, w, 3] → float [B, H, W, C], the encoder that compares the pictures.
    """
    mask = torch.as_tensor(np.asarray(edited_mask)).bool()
    if before.shape != after.shape or before.shape[1] % mask.shape[0] or before.shape[2] % mask.shape[1]:
        raise UsageError(
            f"pictures have shapes {before.shape} and {after.shape}, expected equal ones [L, h, w, 3] with sides that "
            f"are multiples of the grid {tuple(mask.shape)}"
        )
    pixels = torch.from_numpy(np.abs(before.astype(np.float64) - after)).mean(dim=3) / 255
    tokens = F.adaptive_avg_pool2d(pixels, (mask.shape[0], mask.shape[1]))  # each token's square
    seen = None
    if encode is not None:
        seen = cosine_distance(*(_float64(encode(levels)) for levels in (before, after)))
    measured = {}
    for level in range(edit_level, len(tokens)):
        inside, outside = (_mean(tokens[level, part]) for part in (mask, ~mask))
        features = [math.nan] * 2 if seen is None else [_mean(seen[level, part]) for part in (mask, ~mask)]
        measured[level] = DecodedLocality(inside, outside, *features)
    return measured


def _float64(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().cpu().double()


def _mask(edited_mask: Any, levels: Any, edit_level: int) -> Tensor:
    mask = torch.as_tensor(np.asarray(edited_mask)).bool()
    num_levels, grid = len(levels), tuple(levels.shape[1:3])
    if tuple(mask.shape) != grid:
        raise UsageError(f"edited_mask has shape {tuple(mask.shape)}, expected the grid {grid}")
    if not 0 <= edit_level < num_levels:
        raise UsageError(f"edit_level {edit_level}, expected 0 to {num_levels - 1}")
    return mask


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan
