"""Layers of the transformers, which compute values and forward-mode derivatives in one pass.

    B batch, D width

A forward-mode derivative is the tangent of a dual number (`torch.autograd.forward_ad` or `torch.func.jvp`). Most
layers compute the tangent themselves, because fused kernels have no forward-mode formula or a slow one; this way the
value still comes from the fused kernel. The tangent is a constant for reverse mode: the objective stops its gradient
anyway, and keeping no graph for it saves memory in a training step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError

NUM_SINUSOIDS = 256
WIDTH_MULTIPLE, PADDED_ON = 64, ("cuda",)
"""Hidden widths of `SwiGLU` are padded to multiples of this many on these devices."""
BLOCK_INIT = 0.32
"""Weights inside blocks start at this over sqrt(fan in)."""


class Linear(nn.Linear):
    """A linear layer whose forward-mode derivative costs one product; torch adds a second one, with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)

    def padded(self, missing: int) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with `missing` further rows of zeros."""
        bias = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.pad(self.weight, (0, 0, 0, missing)), bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, tangent = unpack_dual(x)
    out = F.linear(x, weight, bias)
    if tangent is None:
        return out
    with torch.no_grad():
        tangent = F.linear(tangent, weight)
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


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x).

    Where PADDED_ON holds the device, the products run at a hidden width of the next multiple of 64, which the fast
    kernels of tensor cores need: rows of zeros of w1 and w3 give silu(0)·0 = 0, which columns of zeros of w2 drop.
    """

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = (linear(width, hidden, BLOCK_INIT, bias=bias) for _ in range(2))
        self.w2 = linear(hidden, width, BLOCK_INIT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        missing = -self.w2.in_features % WIDTH_MULTIPLE if x.device.type in PADDED_ON else 0
        if not missing:
            return self.w2(F.silu(self.w1(x)) * self.w3(x))
        gate, value = (_linear(x, *each.padded(missing)) for each in (self.w1, self.w3))
        return _linear(F.silu(gate) * value, F.pad(self.w2.weight, (0, missing)), self.w2.bias)


class _Recomputed(torch.autograd.Function):
    """A node of the graph that replaces a block: it keeps only the inputs, and runs the block again for gradients."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, out: Tensor, count: int, *inputs_and_weights: Tensor) -> Tensor:
        ctx.block, ctx.weights = block, inputs_and_weights[count:]
        ctx.autocast = (torch.is_autocast_enabled(out.device.type), torch.get_autocast_dtype(out.device.type))
        ctx.save_for_backward(*inputs_and_weights[:count])
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        pairs = zip(ctx.saved_tensors, needed, strict=False)  # the rest of `needed` is of the weights
        inputs = [x.detach().requires_grad_(is_needed) for x, is_needed in pairs]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(gradients[0].device.type, dtype, enabled=enabled):
            out = ctx.block(*inputs)
        sought = [x for x in (*inputs, *ctx.weights) if x.requires_grad]
        found = iter(torch.autograd.grad(out, sought, gradients))
        return None, None, None, *(next(found) if is_needed else None for is_needed in needed)


def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Compute `block(*inputs)` and keep only the inputs for reverse mode: exact, at the cost of one more forward pass.

    The activation checkpointing of torch cannot do this: it saves tensors in a pass with tangents, and fails to match
    them in the pass without tangents that reverse mode runs.
    """
    if not torch.is_grad_enabled():
        return block(*inputs)
    with torch.no_grad():
        out, tangent = unpack_dual(block(*inputs))
    values = [unpack_dual(x)[0] for x in inputs]
    trained = [p for p in block.parameters() if p.requires_grad]
    out = _Recomputed.apply(block, out, len(values), *values, *trained)
    return out if tangent is None else make_dual(out, tangent)


def linear(fan_in: int, fan_out: int, scale: float = 1.0, *, bias: bool = True) -> Linear:
    """Make a linear layer with weights N(0, scale²/fan_in) and zero bias."""
    layer = Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(fan_in))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def learned_tokens(count: int, width: int) -> nn.Parameter:
    """Make tokens [1, count, width]; with three dimensions, so that Muon does not treat them as a matrix."""
    return nn.Parameter(torch.randn(1, count, width) / width**0.5)


def to_patches(canvas: Tensor, p: int) -> Tensor:
    """Join each square of p×p places of a canvas or picture [B, H·p, W·p, C] into one token: [B, H·W, p²·C]."""
    squares = canvas.unflatten(2, (-1, p)).unflatten(1, (-1, p))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


def from_patches(tokens: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """Undo `to_patches` for a grid of H×W tokens."""
    squares = tokens.unflatten(-1, (p, p, -1)).unflatten(1, grid)
    return squares.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def check_shape(what: str, found: Tensor, expected: tuple[int, ...], advice: str) -> None:
    """Raise MismatchError unless a tensor has the shape that a network expects; what: `z has`, for example."""
    if tuple(found.shape) != expected:
        raise MismatchError(f"{what} shape {tuple(found.shape)}, the network expects {expected}: {advice}")


def per_sample(value: Tensor) -> Tensor:
    """Reshape a number per sample [B] to multiply canvases [B, H, W, C]."""
    return value[:, None, None, None]


def make_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Make a dual number, inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad.make_dual(value, tangent, level=_level())


def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent of a dual number, or any other tensor and None."""
    return tuple(forward_ad.unpack_dual(x, level=_level()))


def _level() -> int | None:
    """The forward-mode level: torch's current one, or 0, the only one, under the compiler.

    The compiler looks the level up once, at the start of the graph, where there may be none yet, and would apply that
    to the whole graph.
    """
    return 0 if torch.compiler.is_compiling() else None


def detach_tangent(x: Tensor) -> Tensor:
    """Return the same value and tangent, without the graph of the tangent."""
    value, tangent = unpack_dual(x)
    return x if tangent is None else make_dual(value, tangent.detach())


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its type is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of a grid in row-major order: float32 [rows·columns, width], width a multiple of 4.

    Half of the channels encode the column and half the row, each by sines and cosines at 10,000^(−4i/width).
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=-1)
    column, row = along[:columns].repeat(rows, 1), along[:rows].repeat_interleave(columns, dim=0)
    return torch.cat([column, row], dim=-1).float()
