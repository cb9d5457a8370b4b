"""The transformer's layers, written so that one pass yields values and forward-mode derivatives.

    B batch, N tokens, D width, H heads, d head width

A forward-mode derivative (the tangent of a dual number, `torch.autograd.forward_ad` or `torch.func.jvp`)
passes every layer. Most layers compute their own: fused kernels have no forward-mode formula, or a slow one,
and this way the value still comes from them. The tangent is a constant for reverse mode: the objective stops
its gradient anyway, and keeping no graph for it saves memory in a training step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SINUSOIDS = 256
BLOCK_INIT = 0.32
"""Weights inside blocks start at this over sqrt(fan in)."""


class Linear(nn.Linear):
    """A linear layer whose forward-mode derivative costs one product; torch adds a second one, with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        x, tangent = unpack_dual(x)
        out = F.linear(x, self.weight, self.bias)
        if tangent is None:
            return out
        with torch.no_grad():
            tangent = F.linear(tangent, self.weight)
        return make_dual(out, tangent)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x, tangent = unpack_dual(at_least_float32(x))
        out = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if tangent is None:
            return out
        with torch.no_grad():
            scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
            unit = x * scale
            tangent = (tangent - unit * (unit * tangent).mean(dim=-1, keepdim=True)) * (scale * self.weight)
        return make_dual(out, tangent)


class ScalarEmbedding(nn.Module):
    """A number per sample [B] → float [B, D]: 256 cosines and sines of it, then two layers."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = linear(NUM_SINUSOIDS, width)
        self.out = linear(width, width)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(NUM_SINUSOIDS // 2) / (NUM_SINUSOIDS // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        angles = at_least_float32(value)[:, None] * self.frequencies
        return self.out(F.silu(self.hidden(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, rotated by `rotations` (complex64 [N, 1, d/2])."""

    def __init__(self, width: int, num_heads: int, norm_eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (linear(width, width, BLOCK_INIT, bias=bias) for _ in range(4))
        self.q_norm = RMSNorm(width // num_heads, norm_eps)
        self.k_norm = RMSNorm(width // num_heads, norm_eps)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), rotations).to(v.dtype), rotate(self.k_norm(k), rotations).to(v.dtype)
        heads = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(heads.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x)."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = (linear(width, hidden, BLOCK_INIT, bias=bias) for _ in range(2))
        self.w2 = linear(hidden, width, BLOCK_INIT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


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

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotations) * self.attention_gate
        x = x + self.mlp(self.mlp_norm(x)) * self.mlp_gate
        return detach_tangent(x)


class _Recomputed(torch.autograd.Function):
    """Stands for a block in the graph: holds its input only, and runs it again when gradients are asked for."""

    @staticmethod
    def forward(
        ctx: Any, block: nn.Module, out: Tensor, x: Tensor, rotations: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.block, ctx.weights = block, weights
        ctx.autocast = (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, rotations)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, rotations = ctx.saved_tensors
        x = x.detach().requires_grad_()
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=enabled):
            out = ctx.block(x, rotations)
        found = torch.autograd.grad(out, [x, *ctx.weights], gradients)
        return (None, None, found[0], None, *found[1:])


def recomputed(block: nn.Module, x: Tensor, rotations: Tensor) -> Tensor:
    """`block(x, rotations)` that keeps only x for reverse mode: exact, for one more forward pass of values.

    Activation checkpointing of torch itself cannot do this: what it saves in a pass with tangents it does not find
    again in the pass without that reverse mode needs.
    """
    if not torch.is_grad_enabled():
        return block(x, rotations)
    with torch.no_grad():
        out, tangent = unpack_dual(block(x, rotations))
    x = unpack_dual(x)[0]
    trained = [p for p in block.parameters() if p.requires_grad]
    out = _Recomputed.apply(block, out, x, rotations, *trained)
    return out if tangent is None else make_dual(out, tangent)


def linear(fan_in: int, fan_out: int, scale: float = 1.0, *, bias: bool = True) -> Linear:
    """A linear layer with weights N(0, scale²/fan_in) and zero bias."""
    layer = Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(fan_in))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [B, H, N, d] by the fastest kernel at hand; passes forward-mode derivatives."""
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
    """With P = softmax(S), S = qkᵀ/√d: d(Pv) = P·dv + W·v − rowsum(W)·Pv, where W = P ∘ dS."""
    scale = q.shape[-1] ** -0.5
    P = torch.softmax(at_least_float32((q * scale) @ k.mT), dim=-1).to(v.dtype)
    W = torch.cat([dq * scale, q * scale], dim=-1) @ torch.cat([k, dk], dim=-1).mT
    W *= P
    return P @ dv + W @ v - W.sum(dim=-1, keepdim=True) * out


def make_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """A dual number, within `torch.autograd.forward_ad.dual_level`."""
    return forward_ad.make_dual(value, tangent, level=_level())


def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(value, tangent) of a dual number; of any other tensor itself and None."""
    return tuple(forward_ad.unpack_dual(x, level=_level()))


def _level() -> int | None:
    """The level torch works at when it is not told, or 0, the only one: the compiler looks it up once, at whatever
    stands first in the graph, and would take that there is none for what holds everywhere."""
    return 0 if torch.compiler.is_compiling() else None


def detach_tangent(x: Tensor) -> Tensor:
    """The same value and tangent, without the tangent's graph."""
    value, tangent = unpack_dual(x)
    return x if tangent is None else make_dual(value, tangent.detach())


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of a grid in row-major order: float32 [rows·columns, width], width a multiple of 4.

    Half of the channels tell the column, half the row, each by sines and cosines at 10,000^(−4i/width).
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=-1)
    column, row = along[:columns].repeat(rows, 1), along[:rows].repeat_interleave(columns, dim=0)
    return torch.cat([column, row], dim=-1).float()
