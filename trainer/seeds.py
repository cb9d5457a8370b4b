"""Seeds: parsing, checking and combining them, and the noise drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hierarchy_builder.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_NUMBERS = 10_000_000
"""Largest number of seeds in one command; more than any data set has images."""

MOST_DIGITS = 100
"""Longest number or range that is read; Python refuses to read numbers of thousands of digits."""


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """Parse a list of numbers and ranges such as `0-7` or `0,3,9-11`. Raises UsageError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        is_number = first.isdecimal() and (last.isdecimal() or not dash)
        if not is_number or len(part) > MOST_DIGITS:
            raise UsageError(f"{what} {text!r}, expected numbers and ranges such as 0-7 or 0,3,9")
        named = range(int(first), int(last or first) + 1)
        if len(numbers) + len(named) > MOST_NUMBERS:
            raise UsageError(
                f"{what} {text!r}: found more than {MOST_NUMBERS:,} numbers, expected at most that many"
            )
        numbers += named
    if not numbers:
        raise UsageError(f"{what} {text!r}: found no number, expected an ascending range such as 0-7")
    return numbers


def level_noise(seeds: Sequence[int], num_levels: int, grid: tuple[int, int], channels: int) -> Tensor:
    """Draw noise for one image per seed: float32 [L, B, H, W, C] on the CPU.

    Image i depends only on seeds[i], not on the rest of the batch. See `check_seed` for errors.
    """
    import torch  # imported here because the command line parses seeds, and must start without loading torch

    images = []
    for seed in seeds:
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        images.append(torch.randn(num_levels, *grid, channels, generator=generator))
    return torch.stack(images, dim=1)


def row_noise(
    shapes: Sequence[Sequence[int]], rows: Sequence[int], *, seed: int, step: int, device: torch.device | str
) -> list[Tensor]:
    """Draw N(0, 1) for these rows of the global batch of one training step: float32 [rows, *shape] for each shape.

    A row's numbers depend on (seed, step, row) and on the type of `device`, where they are drawn.
    """
    import torch

    generator = torch.Generator(device)
    noises = []
    for row in rows:
        generator.manual_seed(mixed_seed(seed, step, row))
        noises.append([torch.randn(*shape, generator=generator, device=device) for shape in shapes])
    return [torch.stack(each) for each in zip(*noises, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """Rows of the global batch of one training step, as what decides their random numbers.

    A row's numbers depend only on (seed, step, row), so training is the same for any split of the batch over ranks.
    """

    batch_size: int
    """Rows of the global batch."""
    seed: int
    step: int
    rows: slice = field(default_factory=lambda: slice(None))
    device: torch.device | str = "cpu"
    """Where the numbers are wanted."""

    def generator(self) -> torch.Generator:
        """For numbers that are drawn for the whole batch, on the CPU."""
        import torch

        return torch.Generator().manual_seed(mixed_seed(self.seed, self.step))

    def own(self, values: Tensor) -> Tensor:
        """Of values for the whole batch those of these rows, on their device."""
        from hierarchy_builder.machine.transfers import sent

        return sent(values[self.rows], self.device)

    def noise(self, *shapes: Sequence[int]) -> list[Tensor]:
        """N(0, 1) of these rows, float32 [rows, *shape] for each shape; see `row_noise`."""
        rows = range(self.batch_size)[self.rows]
        return row_noise(shapes, rows, seed=self.seed, step=self.step, device=self.device)


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed outside 0 … 2³²−1, the range that torch's CPU generator distinguishes."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed}, expected 0 to {2**32 - 1}")


def mixed_seed(*numbers: int) -> int:
    """Hash several numbers into one seed."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
