"""Running averages of the weights, one per half-life, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError, UsageError
from trainer.training.schedules import ema_decay


class WeightAverages:
    """Exponential averages of a model's parameters, with half-lives counted in images.

    halflives_kimg: thousands of images. ramp: a half-life never exceeds this share of the images seen, so that
    early averages forget the random start. `update` belongs after every optimiser step.
    """

    def __init__(self, model: nn.Module, halflives_kimg: Sequence[float], ramp: float = 0.05) -> None:
        self.ramp = ramp
        self.averages: dict[float, dict[str, Tensor]] = {
            float(halflife): {name: p.detach().float().clone() for name, p in model.named_parameters()}
            for halflife in halflives_kimg
        }

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move every average towards `model`, after the step that made `images_seen` the total."""
        current = [p.detach().float() for p in model.parameters()]
        for halflife, average in self.averages.items():
            decay = ema_decay(images_seen, halflife, batch_size, self.ramp)
            torch._foreach_lerp_(list(average.values()), current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module, halflife: float) -> None:
        """Overwrite the parameters of `model`. Raises UsageError listing the half-lives kept."""
        if float(halflife) not in self.averages:
            kept = ", ".join(self.state_dict()) or "none"
            raise UsageError(f"no weight average of half-life {halflife:g} kimg; this run keeps: {kept}")
        average = self.averages[float(halflife)]
        for name, p in model.named_parameters():
            p.copy_(average[name])

    @contextmanager
    def lent_to(self, model: nn.Module, halflife: float) -> Iterator[None]:
        """Let `model` hold the average of `halflife` for a while; nothing is copied."""
        average = self.averages[halflife]
        own = {name: p.data for name, p in model.named_parameters()}
        try:
            for name, p in model.named_parameters():
                p.data = average[name]
            yield
        finally:
            for name, p in model.named_parameters():
                p.data = own[name]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The averages by half-life ("500") and parameter name, not copied."""
        return {f"{halflife:g}": average for halflife, average in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over saved averages. Raises MismatchError if half-lives, names or shapes differ."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise MismatchError(
                f"weight averages saved for {sorted(state)} kimg, this run keeps {sorted(own)}"
            )
        for halflife, average in own.items():
            wrong = average.keys() ^ state[halflife].keys()
            wrong |= {n for n in average.keys() - wrong if average[n].shape != state[halflife][n].shape}
            if wrong:
                raise MismatchError(f"weight average {halflife} fits another model: see {sorted(wrong)[:3]}")
            for name, tensor in average.items():
                tensor.copy_(state[halflife][name])
