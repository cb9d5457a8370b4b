"""Seeds: how they are written, checked and mixed, and the noise that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hierarchy_builder.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MOST_NUMBERS = 10_000_000
"""Seeds of one command; more than the images of any data set."""


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """Numbers of a list such as `0-7` or `0,3,9-11`. Raises UsageError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"{what} {text!r}, expected numbers and ranges such as 0-7 or 0,3,9")
        named = range(int(first), int(last or first) + 1)
        if len(numbers) + len(named) > MOST_NUMBERS:
            raise UsageError(f"{what} {text!r} name more than {MOST_NUMBERS:,}, expected as many at most")
        numbers += named
    if not numbers:
        raise UsageError(f"{what} {text!r} name none, expected a rising range such as 0-7")
    return numbers


def level_noise(seeds: Sequence[int], num_levels: int, grid: tuple[int, int], channels: int) -> Tensor:
    """Noise for one image per seed: float32 [L, B, H, W, C] on the CPU.

    Image i depends on seeds[i] only, not on its neighbours in the batch. See `check_seed` for errors.
    """
    import torch  # not above: the command line reads seeds, and starts without torch

    images = []
    for seed in seeds:
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        images.append(torch.randn(num_levels, *grid, channels, generator=generator))
    return torch.stack(images, dim=1)


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed outside 0 … 2³²−1, the range torch's CPU generator tells apart."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed}, expected 0 to {2**32 - 1}")


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
