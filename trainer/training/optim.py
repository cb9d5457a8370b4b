"""The optimiser of Trajectory Forcing: Muon for matrices, Adam with Nesterov momentum for all other parameters.

    n number of the update, from 1; g gradient; m, s moments without bias correction
    Muon   m ← μm + (1−μ)g          X = μ·m/(1−μ^(n+1)) + (1−μ)·g/(1−μ^n), orthogonalised
           w ← w − lr·X·sqrt(max(1, rows/columns))
    Adam   m ← b₁m + (1−b₁)g        s ← b₂s + (1−b₂)g²
           w ← w − lr·[b₁·m/(1−b₁^(n+1)) + (1−b₁)·g/(1−b₁^n)] / (sqrt(s/(1−b₂^n)) + 1e-8)

A parameter counts as a matrix if it has two dimensions and is not an embedding table; in the network of Trajectory
Forcing tokens, tables and position embeddings have three dimensions. There is no weight decay and no warm-up.
`torch.optim.Muon` has no bias correction and iterates in bfloat16, so its steps differ.

Each rank orthogonalises its share of the matrices of a shape, and all ranks gather them. On CUDA the iteration runs in
bfloat16 in a run of that precision, as in Jordan's reference implementation.

Source: Jordan et al. (2024), Muon, with the shape factor of its reference implementation.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.training.config import OptimConfig, RuledOptimConfig
from trainer.training.distributed import World

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that moves all singular values towards 1."""
STACK_ELEMENTS = 2**26
"""Matrices of one shape are processed together, up to this many elements (256 MiB in float32)."""
EPS = 1e-8


class MuonAdam(torch.optim.Optimizer):
    """Muon on two-dimensional parameters, Adam with Nesterov momentum on all others.

    named_parameters: as from `model.named_parameters()`; `state_dict` contains the names. tables: names of
    two-dimensional parameters that Adam updates. Parameters without a gradient are not changed. world: the ranks that
    share the work, all of which call `step`. short: whether the iteration of Muon runs in bfloat16.
    """

    # torch keeps them out of what it compiles by wrappers that load its compiler, which takes as long as torch itself.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        tables: Collection[str] = (),
        world: World | None = None,
        short: bool = False,
    ) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        is_matrix = {name: p.ndim == 2 and name not in tables for name, p in named}
        rules = {"muon": [pair for pair in named if is_matrix[pair[0]]]}
        rules["adam"] = [pair for pair in named if not is_matrix[pair[0]]]
        groups = [{"params": pairs, "rule": rule, "step": 0} for rule, pairs in rules.items() if pairs]
        super().__init__(groups, defaults={"lr": config.lr})
        self.config, self.world, self.short = config, world, short

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter once from its `.grad`."""
        for group in self.param_groups:
            group["step"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["rule"] == "muon" else self._adam)(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = self._nesterov(parameters, self.config.momentum, group["step"])
        for indices in _stacks(directions):
            wide = [_wide(directions[i]) for i in indices]
            for i, matrix in zip(indices, self._orthogonalised(wide), strict=True):
                rows, columns = parameters[i].shape
                step = matrix.mT if rows > columns else matrix
                parameters[i].add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _orthogonalised(self, matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalise matrices of one shape: each rank its share, as many on every rank, gathered by all."""
        rank, size = (self.world.rank, self.world.size) if self.world else (0, 1)
        each = -(-len(matrices) // size)
        own = matrices[rank * each : (rank + 1) * each]
        stack = torch.stack(own + [torch.zeros_like(matrices[0])] * (each - len(own)))
        columns = stack.shape[-1]
        if self.short:  # columns of zeros stay zeros, and rows of whole 128 bytes have faster kernels
            stack = F.pad(stack.bfloat16(), (0, -columns % 64))
        update = orthogonalise(stack, steps=self.config.newton_schulz_steps)[..., :columns].contiguous()
        if self.world:
            update = self.world.join(update)
        return list(update[: len(matrices)].to(matrices[0].dtype))

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = self.config.adam_betas
        directions = self._nesterov(parameters, beta1, group["step"])
        squares = self._moments(parameters, "square")
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        scales = torch._foreach_div(squares, 1 - beta2 ** group["step"])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, EPS)
        torch._foreach_addcdiv_(parameters, directions, scales, value=-group["lr"])

    def _nesterov(self, parameters: list[Tensor], beta: float, n: int) -> list[Tensor]:
        """Update the first moments; return the Nesterov direction, each part with its own bias correction."""
        moments = self._moments(parameters, "momentum")
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(moments, gradients, 1 - beta)
        ahead = torch._foreach_mul(moments, beta / (1 - beta ** (n + 1)))
        torch._foreach_add_(ahead, gradients, alpha=(1 - beta) / (1 - beta**n))
        return list(ahead)

    def _moments(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return [self.state[p][name] for p in parameters]


def optimizer_of(
    model: nn.Module, config: OptimConfig | RuledOptimConfig, world: World | None = None, short: bool = False
) -> torch.optim.Optimizer:
    """Return AdamW or `MuonAdam`, depending on the configuration, for the trainable parameters of `model`.

    world, short: as in `MuonAdam`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(config, OptimConfig):
        return MuonAdam(named, config, world=world, short=short)
    if config.rule == "adamw":
        return torch.optim.AdamW(named, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    modules = model.named_modules()
    tables = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}
    return MuonAdam(named, OptimConfig(lr=config.lr, adam_betas=config.betas), tables, world, short)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate, for each matrix, the closest one with orthonormal rows, by Newton–Schulz iteration.

    matrices: float [..., rows, columns] with rows ≤ columns. Singular values end up near 1 (about 0.7 to 1.2).
    """
    a, b, c = NEWTON_SCHULZ
    X = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + EPS)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _stacks(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Group indices of matrices of equal shape, up to transposition, into stacks of limited size."""
    by_shape: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault((*_wide(matrix).shape, matrix.dtype, matrix.device), []).append(i)
    for indices in by_shape.values():
        size = max(1, STACK_ELEMENTS // max(1, matrices[indices[0]].numel()))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
