"""One Fréchet distance of post-training: what describes a sample, the target, and the statistics of samples.

    b images of a part of a batch, n rows of each, D numbers of a row, K classes

    loss = Σ weight·FD/(FD + floor), with the divisor as a constant

The loss stays near the sum of the weights and says nothing; the distances themselves are what falls. The gradient of a
row keeps its factor (1−β)/n (or 1/N), and that of several processes is their sum: it is divided by no world size, while
the release divides by it once more. AdamW ignores the scale, up to its ε of 1e-8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hierarchy_builder.errors import MismatchError, NonFiniteLossError
from trainer.post_training.distance import Target
from trainer.post_training.moments import RunningMoments, Sums, Weighed
from trainer.training.distributed import World

Describe = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(canvases [b, L, H, W, C], labels [b], pictures [b, 3, h, w] or None) → rows [b, n, D], with their gradient."""


class Term(ABC):
    """One distance. For a batch: `add` for each part, `compare` once, then `surrogate` for each part."""

    def __init__(
        self, name: str, describe: Describe, target: Target, moments: RunningMoments, weight: float = 1.0
    ) -> None:
        self.name, self.describe, self.target, self.moments = name, describe, target, moments
        self.weight = weight
        self.value = target.mean.new_zeros(())
        """FD of the newest batch, float64."""
        self._added: Sums | None = None
        self._rows: list[Tensor] = []
        """Of this process's part of a batch: the sums and, where the statistics need them, the rows."""

    def add(self, rows: Tensor, label: Tensor) -> None:
        """Add the rows [b, n, D] of a part of a batch, or of the samples drawn before the first step."""
        sums = self._sums(rows, label)
        self._added = sums if self._added is None else self._added.plus(sums)
        if self.moments.needs_rows:
            self._rows.append(rows.detach().flatten(0, 1).float())

    def begin(self, world: World) -> None:
        """Begin the statistics with the samples of all processes that were added."""
        self.moments.begin(*self._collected(world))

    def compare(self, world: World, floor: float) -> None:
        """Take the batch of all processes into the statistics, and compute its distance and derivatives.

        Raises NonFiniteLossError where samples are not finite.
        """
        sums, rows = self._collected(world)
        self._compare(sums, self.moments.take(sums, rows), floor)

    @abstractmethod
    def surrogate(self, rows: Tensor, label: Tensor) -> Tensor:
        """A number whose gradient by the rows [b, n, D] is that of the loss."""

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return self.moments.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.moments.load(state)

    @abstractmethod
    def _sums(self, rows: Tensor, label: Tensor) -> Sums: ...

    @abstractmethod
    def _compare(self, sums: Sums, weighed: Weighed, floor: float) -> None: ...

    def _collected(self, world: World) -> tuple[Sums, Tensor | None]:
        """What all processes have added, the rows only where the statistics need them; the next batch begins empty."""
        if self._added is None:  # this process drew no sample
            nothing = self.target.mean.new_zeros(0, 1, self.target.width)
            self._added = self._sums(nothing, torch.zeros(0, dtype=torch.int64, device=nothing.device))
        sums = Sums(*map(world.sum, self._added))
        if not (sums.second.isfinite().all() & sums.total.isfinite().all()):
            raise NonFiniteLossError(
                f"{self.name}: samples of the network are not finite; post-train into another folder with a lower "
                "optim.lr"
            )
        rows = world.join(torch.cat(self._rows)) if self._rows else None
        self._added, self._rows = None, []
        return sums, rows


class WholeTerm(Term):
    """The distance of all samples together."""

    def surrogate(self, rows: Tensor, label: Tensor) -> Tensor:
        flat = rows.flatten(0, 1)
        by_mean, by_covariance = self._slopes
        gradient = self._weighed.row_gradient(flat, by_mean, by_covariance) * self._scale
        return (flat * gradient.to(flat.dtype)).sum()

    def _sums(self, rows: Tensor, label: Tensor) -> Sums:
        return Sums.of(rows.flatten(0, 1))

    def _compare(self, sums: Sums, weighed: Weighed, floor: float) -> None:
        found = self.target.distance(*weighed.moments)
        self.value = found.value
        self._slopes = (found.by_mean, found.by_covariance)
        self._weighed, self._scale = weighed, self.weight / (self.value + floor)


class ClassTerm(Term):
    """The mean of the distances of single classes, weighted by their shares of the real images."""

    def __init__(
        self, name: str, describe: Describe, target: Target, moments: RunningMoments, shares: Tensor
    ) -> None:
        """shares: of each class, float64 [K]; they add up to 1."""
        super().__init__(name, describe, target, moments)
        self._shares = shares
        self._values = torch.full_like(shares, torch.nan)
        """Distance of each class when it last had a sample."""

    def surrogate(self, rows: Tensor, label: Tensor) -> Tensor:
        total = rows.new_zeros(())
        for number in label.unique().tolist():
            flat = rows[label == number].flatten(0, 1)
            place = self._places[number]
            gradient = self._taken.at(place).row_gradient(flat, *(s[place] for s in self._slopes))
            scale = self._scale * self._shares[number]
            total = total + (flat * (gradient * scale).to(flat.dtype)).sum()
        return total

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "distances": self._values}

    def load(self, state: Mapping[str, Tensor]) -> None:
        rest = dict(state)
        values = rest.pop("distances", None)
        if values is None or values.shape != self._values.shape:
            raise MismatchError(f"the checkpoint holds no distances of the {len(self._values)} classes")
        self._values = values.to(self._shares.device)
        super().load(rest)

    def _sums(self, rows: Tensor, label: Tensor) -> Sums:
        n = rows.shape[1]
        return Sums.by_class(rows.flatten(0, 1), label.repeat_interleave(n), len(self._shares))

    def _compare(self, sums: Sums, weighed: Weighed, floor: float) -> None:
        has_value = self._values.isfinite() | (self._shares == 0)
        chosen = torch.nonzero((sums.number > 0) | ~has_value)[:, 0]
        self._taken = weighed.at(chosen)
        found = self.target.rows(chosen).distance(*self._taken.moments)
        self._values[chosen] = found.value
        self._slopes = (found.by_mean, found.by_covariance)
        self._places = {int(number): place for place, number in enumerate(chosen)}
        self.value = (self._shares * self._values.nan_to_num()).sum()
        self._scale = self.weight / (self.value + floor)
