"""The transporter, the invertible map of Normalizing Trajectory Models: a stack of affine autoregressive blocks.

    B batch, N tokens in raster order, C channels, D width, ℓ block

    u^ℓ_n = (u^{ℓ−1}_n − μ^ℓ(u^{ℓ−1}_{<n})) / σ^ℓ(u^{ℓ−1}_{<n}),   log|det| = −Σ log σ

Blocks alternate between raster order and its reverse. One pass of causal attention computes all μ and σ, so the map is
parallel; its inverse goes token by token and caches the keys and values of finished tokens. A start token comes first,
so the first token is transformed too. The last layer is initialised with 0: a new transporter is the identity.

Sources: Normalizing Trajectory Models (2026), arXiv 2605.08078; TARFlow (2024), arXiv 2412.06329; STARFlow (2025),
arXiv 2506.06276, for the start token and the bounded scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.methods.normalizing_trajectory.config import NormalizingModelConfig
from trainer.networks.attention import Attention, Block, Blocks, sequence_rotations
from trainer.networks.layers import RMSNorm, at_least_float32, learned_tokens, linear

LOG_SCALE_BOUND = 4.0
"""Log-scales are c·tanh(a/c) with this c, so elements are scaled by a factor between e^−4 and e^4."""


class KeyValues:
    """Cache of the keys and values of one attention layer for the tokens so far, [B, H, N, d] each."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.length = num_tokens, 0
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, 1, d] of the next token; return those of all tokens so far."""
        if not self.length:
            B, H, _, d = keys.shape
            self.keys, self.values = (new.new_empty(B, H, self.num_tokens, d) for new in (keys, values))
        self.keys[:, :, self.length], self.values[:, :, self.length] = keys[:, :, 0], values[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class CausalAttention(Attention):
    """Attention of each token to itself and the tokens before it; with a cache, x is the one next token."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValues | None = None) -> Tensor:
        if cache is not None:
            k, v = cache.append(k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)


class CausalBlock(Block):
    """A block whose attention is causal."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__(width, num_heads, mlp_ratio, norm_eps)
        self.attention = CausalAttention(width, num_heads, norm_eps)


class AutoregressiveBlock(nn.Module):
    """One affine autoregressive map; with `flipped` it processes the tokens from the last to the first."""

    rotations: Tensor

    def __init__(self, config: NormalizingModelConfig, flipped: bool) -> None:
        super().__init__()
        c, D = config, config.flow_width
        self.flipped, self.max_log_scale = flipped, c.flow_max_log_scale
        self.embedder = linear(c.in_channels, D)
        self.start = learned_tokens(1, D)
        rotations = sequence_rotations(0, c.grid, D // c.flow_heads, c.rope_theta)
        self.register_buffer("rotations", rotations.flip(0) if flipped else rotations, persistent=False)
        self.positions = nn.Parameter(0.02 * torch.randn(1, len(rotations), D))
        self.blocks = Blocks(
            CausalBlock(D, c.flow_heads, c.mlp_ratio, c.norm_eps) for _ in range(c.flow_depth)
        )
        self.norm = RMSNorm(D, c.norm_eps)
        self.out = linear(D, 2 * c.in_channels, 0.0)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map x float32 [B, N, C], condition [B, D] to (u [B, N, C], log|det| by token [B, N])."""
        x = self._ordered(x)
        mean, log_scale = self._affine(x, condition)
        u, log_det = (x - mean) * torch.exp(-log_scale), -log_scale.sum(dim=-1)
        return self._ordered(u), self._ordered(log_det)

    def inverse(self, u: Tensor, condition: Tensor) -> Tensor:
        """Compute x from u = forward(x)[0], token by token."""
        u = self._ordered(u)
        caches = [KeyValues(u.shape[1]) for _ in self.blocks]
        rotations = torch.view_as_complex(at_least_float32(self.rotations))
        x = torch.empty_like(u)
        before, condition = self.start.expand(len(u), 1, -1), condition[:, None]
        places = zip(self.positions.split(1, dim=1), rotations.split(1), strict=True)
        for n, (position, rotation) in enumerate(places):
            h = before + position + condition
            for block, cache in zip(self.blocks, caches, strict=True):
                h = block(h, rotation, cache)
            mean, log_scale = self._read(h)
            x[:, n] = u[:, n] * torch.exp(log_scale[:, 0]) + mean[:, 0]
            before = self.embedder(x[:, n : n + 1])
        return self._ordered(x)

    def _affine(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale of every token, [B, N, C] each, from the tokens before it in this block's order."""
        h = torch.cat([self.start.expand(len(x), 1, -1), self.embedder(x[:, :-1])], dim=1)
        h = h + self.positions[:, : x.shape[1]] + condition[:, None]
        return self._read(self.blocks(h, self.rotations[: x.shape[1]]))

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = at_least_float32(self.out(self.norm(h))).chunk(2, dim=-1)
        return mean, bounded(scale, self.max_log_scale)

    def _ordered(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.flipped else x


class Transporter(nn.Module):
    """A stack of autoregressive blocks: x ↔ u of equal shape, given a condition."""

    def __init__(self, config: NormalizingModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(config, flipped=number % 2 == 1) for number in range(config.flow_blocks)
        )

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map x float32 [B, N, C], condition float [B, D] to (u [B, N, C], log|det ∂u/∂x| by token [B, N]).

        The sum over tokens is the exact logarithm of the determinant; a single token's part has no such meaning.
        """
        log_det = x.new_zeros(x.shape[:2])
        for block in self.blocks:
            x, part = block(x, condition)
            log_det = log_det + part
        return x, log_det

    @torch.no_grad()
    def inverse(self, u: Tensor, condition: Tensor) -> Tensor:
        """Compute x from u [B, N, C], with N steps of one token in each block."""
        for block in reversed(self.blocks):
            assert isinstance(block, AutoregressiveBlock)
            u = block.inverse(u, condition)
        return u


def bounded(a: Tensor, highest: float = LOG_SCALE_BOUND) -> Tensor:
    """Turn a network output into a log-scale: about equal to `a` near 0, always above −4 and below `highest`."""
    bound = torch.where(a > 0, highest, LOG_SCALE_BOUND)
    return bound * torch.tanh(a / bound)
