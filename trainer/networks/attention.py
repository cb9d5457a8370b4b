"""Self-attention with rotary positions, and the block around it; values and forward-mode derivatives in one pass.

B batch, N tokens, D width, H heads, d head width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.networks.layers import (
    BLOCK_INIT,
    RMSNorm,
    SwiGLU,
    at_least_float32,
    detach_tangent,
    linear,
    make_dual,
    recomputed,
    unpack_dual,
)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, rotated by `rotations` (complex64 [N, 1, d/2])."""

    def __init__(self, width: int, num_heads: int, norm_eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (linear(width, width, BLOCK_INIT, bias=bias) for _ in range(4))
        self.q_norm = RMSNorm(width // num_heads, norm_eps)
        self.k_norm = RMSNorm(width // num_heads, norm_eps)

    def forward(self, x: Tensor, rotations: Tensor, *cache: Any) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), rotations).to(v.dtype), rotate(self.k_norm(k), rotations).to(v.dtype)
        heads = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *cache)
        return self.out(heads.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of all tokens, [B, H, N, d]."""
        return attend(q, k, v)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and a learned gate that starts at 0."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = Attention(width, num_heads, norm_eps)
        self.attention_gate = nn.Parameter(torch.zeros(width))
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, int(mlp_ratio * width))
        self.mlp_gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, rotations: Tensor, *cache: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotations, *cache) * self.attention_gate
        x = x + self.mlp(self.mlp_norm(x)) * self.mlp_gate
        return detach_tangent(x)


class Blocks(nn.ModuleList):
    """Blocks that tokens pass one after the other."""

    recompute: bool = False
    """Whether blocks are recomputed in the backward pass instead of storing activations."""

    def forward(self, x: Tensor, rotations: Tensor, *more: Tensor, part: slice = slice(None)) -> Tensor:
        """Pass x [B, N, D] through all blocks, or some; rotations: see `sequence_rotations`, more: of the blocks."""
        rotations = torch.view_as_complex(at_least_float32(rotations))
        for block in list(self)[part]:
            x = recomputed(block, x, rotations, *more) if self.recompute else block(x, rotations, *more)
        return x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [B, H, N, d] by the fastest kernel available, with forward-mode derivatives."""
    (q, dq), (k, dk), (v, dv) = (unpack_dual(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    if dq is None or dk is None or dv is None:
        return out
    with torch.no_grad():
        tangent = _attention_tangent(q, k, v, out, dq, dk, dv)
    return make_dual(out, tangent)


def _attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> Tensor:
    """With P = softmax(S), S = qkᵀ/√d: d(Pv) = P·dv + W·v − rowsum(W)·Pv, where W = P ∘ dS.

    In bfloat16 the last two terms would cancel after rounding where values share a mean and tangents of keys a part, as
    by time tokens: an error of 17 % was seen. There they are P ∘ (dS − rowsum(W)) in float32, times v: below 1 %.
    """
    scale = q.shape[-1] ** -0.5
    P = torch.softmax(at_least_float32((q * scale) @ k.mT), dim=-1)
    W = torch.cat([dq * scale, q * scale], dim=-1) @ torch.cat([k, dk], dim=-1).mT
    if W.dtype != P.dtype:
        W = W.float()
        W -= (P * W).sum(dim=-1, keepdim=True)
        W *= P
        return P.to(v.dtype) @ dv + W.to(v.dtype) @ v
    W *= P
    return P @ dv + W @ v - W.sum(dim=-1, keepdim=True) * out


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Multiply adjacent channel pairs of x [B, N, H, d], float32, as complex numbers by rotations [N, 1, d/2]."""
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor writes no code for complex numbers
        a, b = pairs.unbind(-1)
        cos, sin = torch.view_as_real(rotations).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    pairs = torch.view_as_complex(pairs)
    return torch.view_as_real(pairs * rotations).flatten(-2)


def grid_rotations(rows: int, columns: int, head_width: int, theta: float) -> Tensor:
    """Rotary factors of a grid in row-major order: complex64 [rows·columns, head_width/2].

    The first half of the pairs turns with the row, the second with the column, at theta^(−4i/head_width).
    Source: Su et al. (2021), RoFormer, applied per axis.
    """
    frequencies = theta ** (-torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))
    along_rows = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    along_columns = torch.arange(columns, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([along_rows.repeat_interleave(columns, dim=0), along_columns.repeat(rows, 1)], dim=-1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def sequence_rotations(
    still: int, grid: tuple[int, int], head_width: int, theta: float, copies: int = 1
) -> Tensor:
    """Rotary factors of tokens that are not rotated, then of a grid or copies of it, as real pairs: [N, 1, d/2, 2]."""
    turned = grid_rotations(*grid, head_width, theta)
    unmoved = torch.ones(still, turned.shape[-1], dtype=turned.dtype)
    return torch.view_as_real(torch.cat([unmoved, *[turned] * copies])[:, None])
