"""Mean and covariance of many samples, of which only the newest batch carries a gradient.

    n rows of a batch, N rows of a queue, D numbers of a row, K classes

A batch is far too small for a covariance, so earlier samples count too, as constants:

    average   μ ← β·μ + (1−β)·mean x,  M ← β·M + (1−β)·mean xxᵀ,  Σ = M − μμᵀ: moving averages
    snapshot  mean and covariance (divisor N−1) of the last N rows, computed anew from a queue in float32
    online    the same from running sums in float64, from which the oldest rows are subtracted

In each of them the derivative of a function of μ and Σ by a row x of the batch is a·∂μ + 2c·∂Σ·(x − μ), with a = c =
(1−β)/n, or a = 1/N and c = 1/(N−1). All sums are float64 and are added over parts and ranks, so that a batch may be
computed in parts of any size.

Source: "Representation Fréchet Loss for Visual Generation", arXiv 2604.28190.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError


class Sums(NamedTuple):
    """Number, Σx and Σxxᵀ of rows, float64; the sums of two sets of rows are those of both together."""

    number: Tensor
    """[…]"""
    total: Tensor
    """[…, D]"""
    second: Tensor
    """[…, D, D]"""

    @classmethod
    def of(cls, rows: Tensor) -> Sums:
        """The sums of rows [n, D]."""
        x = rows.detach().double()
        return cls(x.new_full((), len(x)), x.sum(dim=0), x.T @ x)

    @classmethod
    def by_class(cls, rows: Tensor, label: Tensor, num_classes: int) -> Sums:
        """The sums of the rows of each class. rows: [n, D]. label: int64 [n]. Returns [K], [K, D], [K, D, D]."""
        x = rows.detach().double()
        D = x.shape[1]
        count, total = x.new_zeros(num_classes), x.new_zeros(num_classes, D)
        second = x.new_zeros(num_classes, D, D)
        for number in label.unique().tolist():
            count[number], total[number], second[number] = cls.of(x[label == number])
        return cls(count, total, second)

    def plus(self, other: Sums) -> Sums:
        """The sums of both sets of rows."""
        return Sums(self.number + other.number, self.total + other.total, self.second + other.second)

    def moments(self) -> Moments:
        """Mean and covariance with that number as divisor."""
        mean = self.total / self.number[..., None]
        return Moments(
            mean, self.second / self.number[..., None, None] - mean[..., :, None] * mean[..., None, :]
        )


class Moments(NamedTuple):
    """Mean float64 […, D] and covariance float64 […, D, D]."""

    mean: Tensor
    covariance: Tensor


class Weighed(NamedTuple):
    """The moments of all samples, and the weights of the derivative by a row of the newest batch."""

    moments: Moments
    by_mean: Tensor
    """a […]"""
    by_covariance: Tensor
    """c […]"""

    def at(self, chosen: Tensor | int) -> Weighed:
        """Those of some classes, or of one, where there are several."""
        moments = Moments(*(each[chosen] for each in self.moments))
        return Weighed(moments, self.by_mean[chosen], self.by_covariance[chosen])

    def row_gradient(self, rows: Tensor, by_mean: Tensor, by_covariance: Tensor) -> Tensor:
        """a·∂μ + 2c·∂Σ·(x − μ) of rows of the newest batch, float64 [n, D].

        by_mean, by_covariance: derivatives of a function of the moments, [D] and symmetric [D, D].
        """
        away = rows.detach().double() - self.moments.mean
        return self.by_mean * by_mean + 2 * self.by_covariance * (away @ by_covariance)


class RunningMoments(ABC):
    """What is kept of all samples so far; `begin` once, then `take` for each batch."""

    needs_rows: bool
    """Whether `begin` and `take` need the rows themselves, [N or n, D], or their sums alone."""
    kept: tuple[str, ...]
    """The attributes that a checkpoint holds."""

    @abstractmethod
    def begin(self, sums: Sums, rows: Tensor | None) -> None:
        """Begin with the samples drawn before the first step."""

    @abstractmethod
    def take(self, sums: Sums, rows: Tensor | None) -> Weighed:
        """Take the batch of all ranks, and return the moments with it."""

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""
        return {name: getattr(self, name) for name in self.kept}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises MismatchError for tensors of another shape."""
        own = self.state()
        ours, theirs = ({name: list(t.shape) for name, t in each.items()} for each in (own, state))
        if ours != theirs:
            raise MismatchError(f"the checkpoint holds statistics {theirs}, this run keeps {ours}")
        for name, tensor in own.items():
            setattr(self, name, state[name].to(tensor.device))


class Average(RunningMoments):
    """Moving averages of x and xxᵀ, of one set of rows or of several classes, [K, …], at once.

    Classes without a row in a batch stay as they are.
    """

    needs_rows, kept = False, ("mean", "second")

    def __init__(self, beta: float, *shape: int, device: torch.device | str = "cpu") -> None:
        """shape: D, or K and D."""
        self.beta = beta
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.second = torch.zeros((*shape, shape[-1]), dtype=torch.float64, device=device)

    def begin(self, sums: Sums, rows: Tensor | None = None) -> None:
        count = sums.number.clamp(min=1)
        self.mean, self.second = sums.total / count[..., None], sums.second / count[..., None, None]

    def take(self, sums: Sums, rows: Tensor | None = None) -> Weighed:
        weight = (1 - self.beta) * (sums.number > 0)
        each = weight / sums.number.clamp(min=1)
        self.mean = (1 - weight)[..., None] * self.mean + each[..., None] * sums.total
        self.second = (1 - weight)[..., None, None] * self.second + each[..., None, None] * sums.second
        covariance = self.second - self.mean[..., :, None] * self.mean[..., None, :]
        return Weighed(Moments(self.mean, covariance), each, each)


class Queue(RunningMoments):
    """The last N rows, float32, from which moments are computed anew for each batch (`snapshot`)."""

    needs_rows = True
    kept: tuple[str, ...] = ("rows", "oldest")

    def __init__(self, num_rows: int, width: int, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(num_rows, width, device=device)
        self.oldest = torch.tensor(0)
        """Row that is replaced next; on the CPU."""

    def begin(self, sums: Sums, rows: Tensor | None) -> None:
        assert rows is not None
        if len(rows) != len(self.rows):
            raise UsageError(
                f"{len(rows)} rows to begin with, expected the {len(self.rows)} of the queue: draw as many"
            )
        self.rows, self.oldest = rows.detach().float().clone(), torch.tensor(0)

    def take(self, sums: Sums, rows: Tensor | None) -> Weighed:
        self._replace(rows)
        return self._weighed(Sums.of(self.rows))

    def _replace(self, rows: Tensor | None) -> Tensor:
        """Put the rows of a batch in place of the oldest ones, and return those."""
        assert rows is not None
        N = len(self.rows)
        if len(rows) > N:
            raise UsageError(
                f"a batch of {len(rows)} rows, expected at most the {N} of the queue: lengthen it"
            )
        places = (self.oldest + torch.arange(len(rows), device=self.rows.device)) % N
        before = self.rows[places]
        self.rows[places] = rows.detach().float()
        self.oldest = (self.oldest + len(rows)) % N
        return before

    def _weighed(self, sums: Sums) -> Weighed:
        N, (mean, covariance) = len(self.rows), sums.moments()
        weights = mean.new_tensor([1 / N, 1 / (N - 1)])
        return Weighed(Moments(mean, covariance * (N / (N - 1))), weights[0], weights[1])


class OnlineQueue(Queue):
    """The last N rows, with their sums in float64, which every batch updates (`online`)."""

    kept = ("rows", "oldest", "total", "second")

    def __init__(self, num_rows: int, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_rows, width, device)
        _, self.total, self.second = Sums.of(self.rows)

    def begin(self, sums: Sums, rows: Tensor | None) -> None:
        super().begin(sums, rows)
        _, self.total, self.second = Sums.of(self.rows)

    def take(self, sums: Sums, rows: Tensor | None) -> Weighed:
        before = Sums.of(self._replace(rows))
        assert rows is not None
        after = Sums.of(rows.float())
        self.total = self.total - before.total + after.total
        self.second = self.second - before.second + after.second
        return self._weighed(Sums(self.total.new_full((), len(self.rows)), self.total, self.second))
