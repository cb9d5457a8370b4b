"""The network of Normalizing Trajectory Models: transporter x ↔ u, predictor of u_s from u_t, learned denoiser.

    B batch, H×W grid, N = H·W tokens, C channels, D width, T transitions

The predictor takes one state and predicts the next cleaner one, all tokens at once; the predicted state is not among
its inputs, so the likelihood is exact. The state's time, the number of transitions and, if canvases of several levels
are modelled, the level are added to every token; class tokens come first. All output layers are initialised with 0: a
new network predicts N(a·u_t, 1), with an identity transporter.

Source: Normalizing Trajectory Models (2026), arXiv 2605.08078, §3 and A.1–A.3. The paper's predictor has no skip
connection of u_t; it is added here so that a network narrower than a token can still pass u_t on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError
from trainer.methods.normalizing_trajectory.chains import posterior
from trainer.methods.normalizing_trajectory.config import NormalizingModelConfig
from trainer.methods.normalizing_trajectory.transporter import Transporter, bounded
from trainer.networks.attention import Block, Blocks, sequence_rotations
from trainer.networks.layers import (
    RMSNorm,
    ScalarEmbedding,
    at_least_float32,
    check_shape,
    learned_tokens,
    linear,
    per_sample,
)
from trainer.networks.trajectory_transformer import TrajectoryTransformer

TIME_SCALE = 100.0
"""Times are multiplied by this before they are embedded, so that times near 0 have distinct embeddings."""


class Gaussian(NamedTuple):
    """Mean and logarithm of the standard deviation of each element, float32 [B, H, W, C]."""

    mean: Tensor
    log_sigma: Tensor


class Given(NamedTuple):
    """Conditions of a trajectory. label: int64 [B], `num_classes` is the null class. level: int64 [B].
    prev: float32 [B, H, W, C], the clean canvas of the level before. Only trajectory `canvases` reads level and prev.
    """

    label: Tensor
    level: Tensor
    prev: Tensor

    def repeated(self, times: int) -> Given:
        """Repeat each sample `times` times in a row."""
        return Given(*(part.repeat_interleave(times, dim=0) for part in self))


class SpatialTransformer(nn.Module):
    """Maps states u [B, H, W, C] to tokens [B, N, D] by blocks over class tokens and image tokens."""

    rotations: Tensor

    def __init__(self, config: NormalizingModelConfig, depth: int) -> None:
        super().__init__()
        c, D = config, config.width
        self.config = config
        self.embedder = linear(2 * c.in_channels if c.knows_levels else c.in_channels, D)
        self.class_tokens = learned_tokens(c.num_class_tokens, D)
        self.class_table = learned_tokens(c.num_classes + 1, D)
        rotations = sequence_rotations(c.num_class_tokens, c.grid, D // c.num_heads, c.rope_theta)
        self.register_buffer("rotations", rotations, persistent=False)
        self.positions = nn.Parameter(0.02 * torch.randn(1, len(rotations), D))
        self.blocks = Blocks(Block(D, c.num_heads, c.mlp_ratio, c.norm_eps) for _ in range(depth))
        self.norm = RMSNorm(D, c.norm_eps)

    def forward(self, u: Tensor, given: Given, condition: Tensor) -> Tensor:
        seen = torch.cat([u, given.prev], dim=-1) if self.config.knows_levels else u
        image = self.embedder(seen.flatten(1, 2)) + condition[:, None]
        classes = self.class_tokens + self.class_table[0][given.label][:, None]
        x = self.blocks(torch.cat([classes, image], dim=1) + self.positions, self.rotations)
        return self.norm(x[:, classes.shape[1] :])


class Predictor(nn.Module):
    """Predicts the next state of a trajectory; trained from scratch."""

    def __init__(self, config: NormalizingModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = SpatialTransformer(config, config.depth)
        self.target_time = ScalarEmbedding(config.width)
        self.condition = Condition(config, config.width)
        self.out = linear(config.width, 2 * config.in_channels, 0.0)

    def forward(self, u: Tensor, t: Tensor, s: Tensor, given: Given, num_steps: int) -> Gaussian:
        condition = self.condition(t, given.level, num_steps) + self.target_time(TIME_SCALE * s)
        tokens = self.trunk(u, given, condition)
        mean, scale = at_least_float32(self.out(tokens)).unflatten(1, self.config.grid).chunk(2, dim=-1)
        # The factor of u_t in the mean: the posterior's; with `levels` 1, except for the coarsest level.
        skip = (t < 1).to(t.dtype) if self.config.trajectory == "levels" else posterior(t, s).a
        return Gaussian(per_sample(skip) * u + mean, bounded(scale))


class FlowPredictor(nn.Module):
    """Predicts the next state with a flow-matching network; before training it equals that network's posterior sampler.

    û₀ = u_t − t·v,   μ = A·u_t + B·û₀,   σ = C·exp(δ), where δ is a linear layer, initialised with 0, on the last
    hidden tokens
    """

    def __init__(self, config: NormalizingModelConfig) -> None:
        super().__init__()
        assert config.backbone is not None
        self.backbone = TrajectoryTransformer(config.backbone)
        channels = config.in_channels * config.backbone.patch_size**2
        self.delta = linear(config.backbone.width, channels, 0.0)

    def forward(self, u: Tensor, t: Tensor, s: Tensor, given: Given, num_steps: int) -> Gaussian:
        v, hidden = self.backbone.velocity_and_hidden(u, t=t, **given._asdict())
        a, b, c = (per_sample(factor) for factor in posterior(t, s))
        delta = self.backbone.canvas(self.delta(hidden))
        return Gaussian(a * u + b * (u - per_sample(t) * v), torch.log(c) + bounded(delta))


class Denoiser(nn.Module):
    """Maps u_{t_0} to a clean canvas [B, H, W, C], trained on scores of trajectories, as a residual of u_{t_0}."""

    def __init__(self, config: NormalizingModelConfig) -> None:
        super().__init__()
        self.trunk = SpatialTransformer(config, config.denoiser_depth)
        self.condition = Condition(config, config.width)
        self.out = linear(config.width, config.in_channels, 0.0)

    def forward(self, u: Tensor, t: Tensor, given: Given, num_steps: int) -> Tensor:
        tokens = self.trunk(u, given, self.condition(t, given.level, num_steps))
        return u + at_least_float32(self.out(tokens)).unflatten(1, u.shape[1:3])


class Condition(nn.Module):
    """Embedding [B, D] of a state's time, the number of transitions and the level of the canvas."""

    def __init__(self, config: NormalizingModelConfig, width: int) -> None:
        super().__init__()
        self.num_steps = config.num_steps
        self.time = ScalarEmbedding(width)
        self.steps = learned_tokens(len(self.num_steps), width) if len(self.num_steps) > 1 else None
        self.levels = learned_tokens(config.num_levels, width) if config.knows_levels else None

    def forward(self, t: Tensor, level: Tensor, num_steps: int) -> Tensor:
        condition = self.time(TIME_SCALE * t)
        if self.steps is not None:
            condition = condition + self.steps[0, self.num_steps.index(num_steps)]
        if self.levels is not None:
            condition = condition + self.levels[0][level]
        return condition


class NormalizingNetwork(nn.Module):
    """The network of `NormalizingModelConfig`, float32, initialised from torch's global generator."""

    def __init__(self, config: NormalizingModelConfig) -> None:
        super().__init__()
        self.config = config
        self.flow_condition = Condition(config, config.flow_width)
        self.transporter = Transporter(config)
        self.predictor = FlowPredictor(config) if config.backbone else Predictor(config)
        self.denoiser = Denoiser(config) if config.denoiser_depth else None

    def transport(self, x: Tensor, t: Tensor, level: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Map states x [B, H, W, C] at times t [B] to u and log|det ∂u/∂x| [B, H, W], to be summed over tokens."""
        self.check(x, num_steps)
        u, log_det = self.transporter(x.flatten(1, 2), self.flow_condition(t, level, num_steps))
        return u.unflatten(1, x.shape[1:3]), log_det.unflatten(1, x.shape[1:3])

    @torch.no_grad()
    def untransport(self, u: Tensor, t: Tensor, level: Tensor, num_steps: int) -> Tensor:
        """Invert `transport`, token by token."""
        self.check(u, num_steps)
        x = self.transporter.inverse(u.flatten(1, 2), self.flow_condition(t, level, num_steps))
        return x.unflatten(1, u.shape[1:3])

    def predict(self, u: Tensor, t: Tensor, s: Tensor, given: Given, num_steps: int) -> Gaussian:
        """Return the distribution of u_s given u_t [B, H, W, C]; t, s: float [B], s < t."""
        self.check(u, num_steps)
        return self.predictor(u, t, s, given, num_steps)

    def denoise(self, u: Tensor, t: Tensor, given: Given, num_steps: int) -> Tensor:
        """Predict the clean canvas from u_{t_0}; only for a network with a denoiser."""
        assert self.denoiser is not None
        return self.denoiser(u, t, given, num_steps)

    def check(self, x: Tensor, num_steps: int) -> None:
        """Raise MismatchError unless states and the number of transitions fit the network."""
        expected = (len(x), *self.config.grid, self.config.in_channels)
        advice = "give features of the encoder and grid it was trained on"
        check_shape("states have", x, expected, advice)
        if num_steps not in self.config.num_steps:
            known = " or ".join(map(str, self.config.num_steps))
            raise MismatchError(
                f"{num_steps} transitions, the network was trained on {known}: use {known}, or train one with "
                f"model.num_steps=[{num_steps}]"
            )
