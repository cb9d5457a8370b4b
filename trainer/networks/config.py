"""Configuration fields of every method's network, and of the Trajectory Forcing network, which others reuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hierarchy_builder.fields import MOST, MOST_BLOCKS, MOST_ROWS, CheckedFields, require, require_size


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig(CheckedFields):
    """A transformer over a grid of tokens; every checkpoint stores it, so the network can be rebuilt."""

    grid: tuple[int, int] = (16, 16)
    """Rows and columns of tokens; comes from the shards."""
    in_channels: int = 768
    """Channels of one token, the width of the encoder; comes from the shards."""
    num_classes: int = 1000
    """Number of classes; comes from the shards. The label table has one more row, the null class."""
    width: int = 768
    """Width of the transformer."""
    depth: int = 16
    """Number of transformer blocks that a token passes through."""
    num_heads: int = 12
    """Attention heads of a block."""
    num_class_tokens: int = 8
    """Conditioning tokens that carry the class."""
    mlp_ratio: float = 8 / 3
    """Hidden width of the SwiGLU as a multiple of the width."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        self.check_sizes("in_channels", "num_classes", "mlp_ratio")
        self.check_counts("num_class_tokens")
        self.check_heads("width", "num_heads")
        self.check_above_zero("rope_theta")
        for side in self.grid:
            require_size("a side of the grid", side, MOST_ROWS)
        require_size("depth", self.depth, MOST_BLOCKS)
        require(0 <= self.norm_eps < 1, f"norm_eps is {self.norm_eps}, expected 0 up to below 1")

    def check_sizes(self, *names: str) -> None:
        """Raise UsageError if a field is 0, negative or implausibly large."""
        for name in names:
            require_size(name, getattr(self, name))

    def check_counts(self, *names: str, most: int = MOST) -> None:
        """Raise UsageError if a field is negative or larger than `most`."""
        for name in names:
            count = getattr(self, name)
            require(0 <= count <= most, f"{name} is {count}, expected 0 to {most:,}")

    def check_heads(self, width: str, heads: str) -> None:
        """Raise UsageError unless each head gets a whole number of rotary pairs for rows and columns."""
        self.check_sizes(width, heads)
        found, factor = getattr(self, width), 4 * getattr(self, heads)
        require(
            found % factor == 0,
            f"{width} {found}, expected a multiple of 4 × {heads} = {factor} (rotary pairs)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(NetworkConfig):
    """The network of Trajectory Forcing. Defaults are TF-B on DINOv2-B features."""

    num_levels: int = 4
    """L, levels of the hierarchy including the raw tokens; comes from the shards."""
    head_depth: int = 8
    """Blocks of the u-head, and as many of the v-head; the first depth − head_depth blocks are shared."""
    num_time_tokens: int = 8
    """Conditioning tokens that carry h = t − r."""
    num_level_tokens: int = 8
    """Conditioning tokens that carry the level."""
    guidance: bool = False
    """Whether the network takes a guidance scale omega and its interval as input."""
    num_guidance_tokens: int = 4
    """Conditioning tokens that carry omega, if the network takes guidance."""
    num_interval_tokens: int = 2
    """Conditioning tokens for each end of the guidance interval, if the network takes guidance."""
    fusion: Literal["fused", "concat"] = "fused"
    """How the previous level's canvas is fed in: fused with each token, or appended to the sequence."""
    start: Literal["zeros", "gaussian"] = "zeros"
    """What the network draws before training: canvases of zeros as in the release, or `gaussian` ones around the
    previous level's canvas, with the means of the classes and the variances that the shards have there."""
    start_share: float = 0.75
    """Share of the shards' variance that canvases of a `gaussian` start have; training adds to it."""
    patch_size: int = 1
    """Side of the square of grid tokens that the network joins into one of its own tokens; 2 makes a step several
    times as fast, the release joins none."""

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # super() does not find the class that slots make
        self.check_counts(*(f"num_{name}_tokens" for name in ("time", "level", "guidance", "interval")))
        require(
            0 < self.head_depth <= self.depth,
            f"head_depth {self.head_depth}, expected 1 to depth {self.depth}",
        )
        require(2 <= self.num_levels <= MOST, f"num_levels is {self.num_levels}, expected 2 to {MOST:,}")
        require(0 < self.start_share <= 1, f"start_share is {self.start_share}, expected above 0, at most 1")
        require(
            self.patch_size >= 1 and not any(side % self.patch_size for side in self.grid),
            f"patch_size is {self.patch_size} on a grid of {self.grid[0]}×{self.grid[1]} tokens, expected a divisor of "
            "both sides; 1 joins no tokens",
        )
