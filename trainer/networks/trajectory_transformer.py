"""The transformer of Trajectory Forcing: it predicts the clean canvas and two velocities from a noisy canvas.

    B batch, H×W grid, C channels of the encoder, D width, P conditioning tokens, p patch size, N = H·W/p² tokens

The noisy canvas and the canvas of the previous level are either fused into one sequence of N tokens or concatenated
("concat": 2N tokens; both tokens of a grid position have the same rotary angle and different learned positions). P
learned conditioning tokens come first, for class, guidance, time and level; time is given as h = t − r. A shared
trunk feeds two heads that predict the clean canvas: the u-head for the average velocity over [r, t], the v-head for
the instantaneous velocity. Drawing noise and computing the loss happen outside. The release has p = 1; with a larger
p, as in DiT, a square of p×p grid tokens enters and leaves the network as one token of p²·C channels. The release's
heads start from a canvas of zeros; `gaussian_start` describes the other start, with which the network is given t too.

Source: Trajectory Forcing (2026), with the network of pixel MeanFlow (2026), arXiv 2601.22158.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from hierarchy_builder.errors import UsageError
from trainer.networks.attention import Block, Blocks, sequence_rotations
from trainer.networks.config import ModelConfig
from trainer.networks.gaussian_start import GaussianStart, Seen
from trainer.networks.layers import (
    RMSNorm,
    ScalarEmbedding,
    at_least_float32,
    check_shape,
    detach_tangent,
    from_patches,
    learned_tokens,
    linear,
    make_dual,
    per_sample,
    to_patches,
    unpack_dual,
)

TIME_FLOOR = 0.05
"""Velocities divide by max(t, floor)."""

Heads = Literal["uv", "u", "v"]


class Prediction(NamedTuple):
    """Predictions at z: float32 [B, H, W, C] each; None for a head that was not evaluated.

    x: clean canvas predicted by the u-head. u: average velocity over [r, t]. v: instantaneous velocity.
    """

    x: Tensor
    u: Tensor
    v: Tensor


class Guidance(NamedTuple):
    """Guidance as an input of the network: scale omega ≥ 1, applied for t_min ≤ t ≤ t_max; [B] each."""

    omega: Tensor
    t_min: Tensor
    t_max: Tensor


GuidanceLike = Mapping[str, object] | Sequence[object]
"""What `as_guidance` takes."""


def velocity(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity at z [B, H, W, C] that leads to the clean canvas x: (z − x)/clip(t, 0.05, 1)."""
    return (z - x) / per_sample(t.clamp(TIME_FLOOR, 1.0))


def as_guidance(guidance: GuidanceLike, like: Tensor) -> Guidance:
    """Make Guidance from a mapping or a triple of numbers or tensors, expanded to the shape [B] of `like`."""
    values = (
        [guidance[name] for name in Guidance._fields] if isinstance(guidance, Mapping) else list(guidance)
    )
    if len(values) != 3:
        raise UsageError(f"guidance holds {len(values)} values, expected omega, t_min and t_max")
    return Guidance(
        *(torch.as_tensor(value, dtype=like.dtype, device=like.device).expand(like.shape) for value in values)
    )


class TrajectoryTransformer(nn.Module):
    """The network of `ModelConfig`, float32, initialised from torch's global generator."""

    rotations: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c, D = config, config.width
        channels = c.in_channels * c.patch_size**2
        self.x_embedder = linear(channels, D)
        self.prev_embedder = linear(channels, D)
        if c.fusion == "fused":
            self.fusion = linear(2 * D, D)
        self.class_tokens = learned_tokens(c.num_class_tokens, D)
        self.class_table = learned_tokens(c.num_classes + 1, D)
        if c.guidance:
            self.omega_tokens = learned_tokens(c.num_guidance_tokens, D)
            self.t_min_tokens = learned_tokens(c.num_interval_tokens, D)
            self.t_max_tokens = learned_tokens(c.num_interval_tokens, D)
            self.omega_embedder, self.t_min_embedder, self.t_max_embedder = (
                ScalarEmbedding(D) for _ in range(3)
            )
        self.time_tokens = learned_tokens(c.num_time_tokens, D)
        self.time_embedder = ScalarEmbedding(D)
        self.level_tokens = learned_tokens(c.num_level_tokens, D)
        self.level_table = learned_tokens(c.num_levels + 1, D)
        still, copies = self.num_conditioning_tokens, 1 if c.fusion == "fused" else 2
        rotations = sequence_rotations(still, self._network_grid, D // c.num_heads, c.rope_theta, copies)
        self.register_buffer("rotations", rotations, persistent=False)
        self.positions = nn.Parameter(0.02 * torch.randn(1, len(rotations), D))
        self.shared_blocks = self._blocks(c.depth - c.head_depth)
        self.u_blocks, self.v_blocks = self._blocks(c.head_depth), self._blocks(c.head_depth)
        self.u_norm, self.v_norm = RMSNorm(D, c.norm_eps), RMSNorm(D, c.norm_eps)
        self.u_out, self.v_out = linear(D, channels, 0.0), linear(D, channels, 0.0)
        self.start = None
        if c.start == "gaussian":
            self.start = GaussianStart(c.grid, c.in_channels, c.num_classes, c.num_levels)
            self.noise_embedder = ScalarEmbedding(D)

    @property
    def num_conditioning_tokens(self) -> int:
        """P, the number of tokens before the image tokens."""
        c = self.config
        guidance = c.num_guidance_tokens + 2 * c.num_interval_tokens if c.guidance else 0
        return c.num_class_tokens + guidance + c.num_time_tokens + c.num_level_tokens

    def forward(
        self,
        z: Tensor,
        *,
        t: Tensor,
        r: Tensor,
        label: Tensor,
        level: Tensor,
        prev: Tensor,
        guidance: GuidanceLike | None = None,
        heads: Heads = "uv",
    ) -> Prediction:
        """Predict from the canvas z at time t.

        z, prev: float [B, H, W, C], the noisy canvas and the clean one of the previous level (zeros at level 0).
        t, r: float [B], 0 ≤ r ≤ t ≤ 1. label: int64 [B]; `num_classes` is the null class. level: int64 [B].
        guidance: only for a network built with it; None means no guidance (omega 1).
        heads: evaluate both heads or only one of them.
        Raises MismatchError if z does not fit the network, UsageError if guidance does not.
        """
        x, seen = self._trunk(z, t, r, label, level, prev, guidance)
        x_u, u, v = None, None, None
        if "u" in heads:
            x_u, u = self._u_head(x, z, t, r, seen)
        if "v" in heads:
            v, _ = self._v_head(x, z, t, seen)
        return Prediction(x_u, u, v)  # type: ignore[arg-type]

    def velocity_and_hidden(self, z: Tensor, *, t: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the instantaneous velocity [B, H, W, C] at z, and the hidden tokens [B, N, D] before its output layer.

        inputs: label, level and prev as for `forward`.
        """
        x, seen = self._trunk(z, t, t, **inputs)
        return self._v_head(x, z, t, seen)

    def forward_with_derivative(
        self, z: Tensor, direction: Tensor, *, t: Tensor, r: Tensor, **inputs: Any
    ) -> tuple[Prediction, Tensor]:
        """Predict, and differentiate u along (direction, 1, 0) in (z, t, r): returns (Prediction, du_dt).

        direction: float [B, H, W, C]. inputs: label, level, prev and guidance; all as for `forward`. du_dt is detached;
        the v-head is not differentiated.
        """
        with forward_ad.dual_level():
            z_dual = make_dual(z, direction.to(z.dtype))
            t_dual = make_dual(t, torch.ones_like(t))
            x, seen = self._trunk(z_dual, t_dual, r, **inputs)
            x_u_dual, u_dual = self._u_head(x, z_dual, t_dual, r, seen)
            u, du_dt = unpack_dual(u_dual)
            x_u, x = unpack_dual(x_u_dual)[0], unpack_dual(x)[0]
            assert du_dt is not None  # t is dual
            du_dt = du_dt.detach()
            seen = seen and Seen(*(unpack_dual(part)[0] for part in seen))
        v, _ = self._v_head(x, z, t, seen)
        return Prediction(x_u, u, v), du_dt

    def _u_head(self, x: Tensor, z: Tensor, t: Tensor, r: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor]:
        """Return the clean canvas and the average velocity from t to r, float32 [B, H, W, C] each."""
        return self._towards(self.u_out(self._hidden(x, self.u_blocks, self.u_norm)), z, t, r, seen)

    def _v_head(self, x: Tensor, z: Tensor, t: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor]:
        """Return the instantaneous velocity float32 [B, H, W, C], and the hidden tokens [B, N, D]."""
        hidden = self._hidden(x, self.v_blocks, self.v_norm)
        return self._towards(self.v_out(hidden), z, t, t, seen)[1], hidden

    def _hidden(self, x: Tensor, blocks: Blocks, norm: RMSNorm) -> Tensor:
        image = blocks(x, self.rotations)[:, self.num_conditioning_tokens :]
        return norm(image[:, : math.prod(self._network_grid)])

    def _towards(
        self, tokens: Tensor, z: Tensor, t: Tensor, r: Tensor, seen: Seen | None
    ) -> tuple[Tensor, Tensor]:
        """Return the clean canvas that a head leads to from z, and the velocity there, float32 [B, H, W, C] each.

        tokens: what the head returned, the clean canvas or, with a Gaussian start, what it adds to the start's.
        """
        predicted, z = self.canvas(tokens), at_least_float32(z)
        if self.start is None or seen is None:
            return predicted, velocity(z, predicted, t)
        with torch.autocast(z.device.type, enabled=False):
            u = self.start.velocity(seen, r, predicted)
        return z - per_sample(t.clamp(TIME_FLOOR, 1.0)) * u, u

    def _trunk(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        label: Tensor,
        level: Tensor,
        prev: Tensor,
        guidance: GuidanceLike | None = None,
    ) -> tuple[Tensor, Seen | None]:
        self._check(z, prev, guidance)
        seen = None
        if self.start is not None:
            with torch.autocast(z.device.type, enabled=False):
                seen = self.start.see(at_least_float32(z), t=t, label=label, level=level, prev=prev)
                z = self.start.drawn(seen)
        p = self.config.patch_size
        both = self.x_embedder(to_patches(z, p)), self.prev_embedder(to_patches(prev, p))
        is_fused = self.config.fusion == "fused"
        image = self.fusion(torch.cat(both, dim=-1)) if is_fused else torch.cat(both, dim=1)
        x = torch.cat([*self._conditioning(t, r, label, level, guidance), image], dim=1) + self.positions
        return detach_tangent(self.shared_blocks(x, self.rotations)), seen

    def _conditioning(
        self, t: Tensor, r: Tensor, label: Tensor, level: Tensor, guidance: GuidanceLike | None
    ) -> list[Tensor]:
        tokens = [self.class_tokens + F.embedding(label, self.class_table[0])[:, None]]
        if self.config.guidance:
            omega, t_min, t_max = as_guidance((1.0, 0.0, 1.0) if guidance is None else guidance, like=t)
            tokens.append(self.omega_tokens + self.omega_embedder(1 - 1 / omega)[:, None])
            tokens.append(self.t_min_tokens + self.t_min_embedder(t_min)[:, None])
            tokens.append(self.t_max_tokens + self.t_max_embedder(t_max)[:, None])
        time = self.time_embedder(t - r)
        if self.start is not None:
            time = time + self.noise_embedder(t)
        tokens.append(self.time_tokens + time[:, None])
        tokens.append(self.level_tokens + F.embedding(level, self.level_table[0])[:, None])
        return tokens

    def canvas(self, x_BNC: Tensor) -> Tensor:
        """Lay out p²·C numbers for each of the network's tokens, [B, N, p²·C], as a canvas float32 [B, H, W, C]."""
        return from_patches(at_least_float32(x_BNC), self._network_grid, self.config.patch_size)

    @property
    def _network_grid(self) -> tuple[int, int]:
        """Rows and columns of the network's own tokens."""
        rows, columns = (side // self.config.patch_size for side in self.config.grid)
        return rows, columns

    def _blocks(self, count: int) -> Blocks:
        c = self.config
        return Blocks(Block(c.width, c.num_heads, c.mlp_ratio, c.norm_eps) for _ in range(count))

    def _check(self, z: Tensor, prev: Tensor, guidance: object) -> None:
        expected = (len(z), *self.config.grid, self.config.in_channels)
        for name, canvas in (("z", z), ("prev", prev)):
            check_shape(
                f"{name} has", canvas, expected, "build it with the grid and in_channels of the features"
            )
        if guidance is not None and not self.config.guidance:
            raise UsageError(
                "guidance was given to a network trained without it: leave it out, or train with "
                "model.guidance=true"
            )
