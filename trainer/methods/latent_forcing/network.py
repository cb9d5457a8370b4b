"""The network of Latent Forcing: it predicts clean pixels and latents from noisy ones, each with its own time.

    B batch, H×W grid, N = H·W tokens, P side of a patch in pixels, K canvases, C channels of a canvas, D width

A patch of pixels and the latents at the same position are embedded through bottlenecks and summed to one of N tokens.
Times and class modulate every norm (adaLN-Zero); from block `class_tokens_at` on, class tokens stand before the image
tokens. After the trunk, two experts with their own blocks predict pixels and latents. Drawing noise and computing the
loss happen outside.

t = 1 is noise, as in all of this package. The release, and so its weights, have time 0 for noise and 1 for data; only
`_condition` converts between the two.

Source: Latent Forcing (2026), arXiv 2602.11401, on the network of JiT (2025), arXiv 2511.13720.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.methods.latent_forcing.config import LatentModelConfig
from trainer.networks.attention import Attention, Blocks, sequence_rotations
from trainer.networks.layers import (
    RMSNorm,
    ScalarEmbedding,
    SwiGLU,
    at_least_float32,
    check_shape,
    from_patches,
    grid_positions,
    linear,
    to_patches,
)

PIXEL_CHANNELS = 3
EMBEDDING_STD = 0.02
"""Standard deviation of initial class tables, class tokens and time embeddings."""


class Bottleneck(nn.Module):
    """Two linear layers, the first without bias: tokens [..., F] → [..., D]."""

    def __init__(self, fan_in: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.down, self.up = linear(fan_in, bottleneck, bias=False), linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class AdaptiveBlock(nn.Module):
    """Attention and SwiGLU behind RMSNorms, with shifts, scales and gates computed from a condition [B, D_c]."""

    def __init__(self, config: LatentModelConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = Attention(width, num_heads, config.norm_eps, bias=True)
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = SwiGLU(width, int(config.mlp_ratio * width), bias=True)
        self.modulation = linear(config.width, 6 * width)

    def forward(self, x: Tensor, rotations: Tensor, condition: Tensor) -> Tensor:
        for_attention, for_mlp = self.modulation(condition)[:, None].chunk(2, dim=-1)
        shift, scale, gate = for_attention.chunk(3, dim=-1)
        x = x + gate * self.attention(_modulated(self.attention_norm(x), shift, scale), rotations)
        shift, scale, gate = for_mlp.chunk(3, dim=-1)
        return x + gate * self.mlp(_modulated(self.mlp_norm(x), shift, scale))


class Output(nn.Module):
    """A modulated RMSNorm and a linear layer: [B, N, D] → float32 [B, N, F]."""

    def __init__(self, config: LatentModelConfig, width: int, fan_out: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, config.norm_eps)
        self.modulation = linear(config.width, 2 * width)
        self.out = linear(width, fan_out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return at_least_float32(self.out(_modulated(self.norm(x), shift, scale)))


class Expert(nn.Module):
    """Turns the tokens of the trunk into one modality: a projection, blocks and an output layer."""

    def __init__(self, config: LatentModelConfig, fan_out: int) -> None:
        super().__init__()
        c, width = config, config.expert_width
        self.projection = linear(c.width, width)
        num_heads = width * c.num_heads // c.width
        self.blocks = Blocks(AdaptiveBlock(c, width, num_heads) for _ in range(c.expert_depth))
        self.output = Output(c, width, fan_out)

    def forward(self, x: Tensor, rotations: Tensor, condition: Tensor) -> Tensor:
        return self.output(self.blocks(self.projection(x), rotations, condition), condition)


class PixelLatentTransformer(nn.Module):
    """The network of `LatentModelConfig`, float32, initialised from torch's global generator."""

    rotations: Tensor
    positions: Tensor

    def __init__(self, config: LatentModelConfig) -> None:
        super().__init__()
        self.config = config
        c, D = config, config.width
        patch = PIXEL_CHANNELS * c.patch_px**2
        self.pixel_embedder = Bottleneck(patch, c.pixel_bottleneck, D)
        self.latent_embedder = Bottleneck(c.latent_channels, c.latent_bottleneck, D)
        self.pixel_clock = ScalarEmbedding(D)
        self.latent_clocks = nn.ModuleList(ScalarEmbedding(D) for _ in range(c.num_canvases))
        self.class_table = nn.Embedding(c.num_classes + 1, D)
        self.class_tokens = nn.Parameter(torch.empty(1, c.num_class_tokens, D))
        self.blocks = Blocks(AdaptiveBlock(c, D, c.num_heads) for _ in range(c.depth))
        if c.expert_depth:
            self.pixel_expert, self.latent_expert = Expert(c, patch), Expert(c, c.latent_channels)
        else:
            self.output = Output(c, D, patch + c.latent_channels)
        self.register_buffer("positions", grid_positions(*c.grid, D), persistent=False)
        rotations = sequence_rotations(c.num_class_tokens, c.grid, D // c.num_heads, c.rope_theta)
        self.register_buffer("rotations", rotations, persistent=False)
        self._initialise()

    def forward(
        self, pixels: Tensor, latents: Tensor, *, t_pixels: Tensor, t_latents: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict the clean pixels and latents from noisy ones.

        pixels: float [B, H·P, W·P, 3]; clean pixels lie in [−1, 1]. latents: float [B, H, W, K·C], normalised,
        canvases concatenated. t_pixels: float [B], 1 is noise. t_latents: float [B], or [B, K] with a time for each
        canvas. label: int64 [B]; `num_classes` is the null class. Returns float32 of the same two shapes.
        Raises MismatchError if pixels or latents do not fit the network.
        """
        c, advice = self.config, "build it with the grid, patch_px and in_channels of the data"
        check_shape("pixels have", pixels, (len(pixels), *c.image_px, PIXEL_CHANNELS), advice)
        check_shape("latents have", latents, (len(pixels), *c.grid, c.latent_channels), advice)
        label_BD = self.class_table(label)
        condition = self._condition(t_pixels, t_latents, label_BD)
        rotations = self.rotations[c.num_class_tokens :]
        x = self.pixel_embedder(to_patches(pixels, c.patch_px)) + self.latent_embedder(latents.flatten(1, 2))
        x = self.blocks(x + self.positions, rotations, condition, part=slice(c.class_tokens_at))
        x = torch.cat([(label_BD[:, None] + self.class_tokens).to(x.dtype), x], dim=1)
        x = self.blocks(x, self.rotations, condition, part=slice(c.class_tokens_at, None))
        x = x[:, c.num_class_tokens :]
        if c.expert_depth:
            patches, canvas = (e(x, rotations, condition) for e in (self.pixel_expert, self.latent_expert))
        else:
            both = self.output(x, condition)
            patches, canvas = both.tensor_split([both.shape[-1] - c.latent_channels], dim=-1)
        return from_patches(patches, c.grid, c.patch_px), canvas.unflatten(1, c.grid)

    def _condition(self, t_pixels: Tensor, t_latents: Tensor, label_BD: Tensor) -> Tensor:
        """Return the condition of the norms, [B, D]; in the weights, data have time 1."""
        clocks = t_latents[:, None].expand(-1, len(self.latent_clocks)) if t_latents.ndim == 1 else t_latents
        total = self.pixel_clock(1 - t_pixels) + label_BD
        for embed, t in zip(self.latent_clocks, clocks.unbind(dim=1), strict=True):
            total = total + embed(1 - t)
        return F.silu(total)

    def _initialise(self) -> None:
        """Initialise linear layers Xavier-uniform with bias 0, and modulations and outputs with 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.pixel_clock, *self.latent_clocks):
            _normal(embedding.hidden.weight, embedding.out.weight)
        _normal(self.class_table.weight, self.class_tokens)
        for module in self.modules():
            if isinstance(module, AdaptiveBlock):
                _as_one(module.attention.q, module.attention.k, module.attention.v)
                _as_one(module.mlp.w1, module.mlp.w3)
            if isinstance(module, AdaptiveBlock | Output):
                nn.init.zeros_(module.modulation.weight)
            if isinstance(module, Output):
                nn.init.zeros_(module.out.weight)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


@torch.no_grad()
def _as_one(*layers: nn.Linear) -> None:
    """Scale Xavier's bound √(6/(fan_in + fan_out)) down as if the layers were one matrix, as in the release."""
    fan_out, fan_in = layers[0].weight.shape
    for layer in layers:
        layer.weight.mul_(math.sqrt((fan_in + fan_out) / (fan_in + len(layers) * fan_out)))


def _normal(*weights: Tensor) -> None:
    for weight in weights:
        nn.init.normal_(weight, std=EMBEDDING_STD)
