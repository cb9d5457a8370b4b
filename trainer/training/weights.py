"""Running averages of weights, and loading the weights of a checkpoint into a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError
from trainer.training import checkpoint as saved
from trainer.training.schedules import ema_decay


class WeightAverages:
    """Exponential averages of a model's parameters, with half-lives counted in images.

    halflives_kimg: in thousands of images. ramp: a half-life never exceeds this share of the images seen, so that
    early averages forget the random initialisation. Call `update` after every optimiser step.
    """

    def __init__(self, model: nn.Module, halflives_kimg: Sequence[float], ramp: float = 0.05) -> None:
        self.ramp = ramp
        self.averages: dict[float, dict[str, Tensor]] = {
            float(halflife): {name: p.detach().float().clone() for name, p in model.named_parameters()}
            for halflife in halflives_kimg
        }

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move every average towards `model`, after the step that brought the total to `images_seen`."""
        current = [p.detach().float() for p in model.parameters()]
        for halflife, average in self.averages.items():
            decay = ema_decay(images_seen, halflife, batch_size, self.ramp)
            torch._foreach_lerp_(list(average.values()), current, 1 - decay)

    @contextmanager
    def lent_to(self, model: nn.Module, halflife: float) -> Iterator[None]:
        """Put the average of `halflife` into `model` for the duration of the context; nothing is copied."""
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
        """Return the averages by half-life ("500") and parameter name, without copying."""
        return {f"{halflife:g}": average for halflife, average in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load saved averages. Raises MismatchError if half-lives, names or shapes differ."""
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


def average_of(config: Any, ema: float | str | None) -> str | None:
    """Return the name of the weight average that `ema` selects in a run of `config`; None means the raw weights.

    ema: half-life in thousands of images, `auto` for the first one configured, None or `raw` for the raw weights.
    """
    if ema == "auto":
        ema = config.optim.ema_halflives_kimg[0] if config.optim.ema_halflives_kimg else None
    return None if ema in (None, "raw") else str(ema) if isinstance(ema, str) else f"{ema:g}"


def fill(network: nn.Module, path: Path, name: str | None) -> None:
    """Load weights of a checkpoint into a network. Raises MismatchError if their names or shapes differ."""
    try:
        network.load_state_dict(saved.load_weights(path, name))
    except RuntimeError:
        raise MismatchError(
            f"{path}: the weights do not fit the network that {saved.STATE} describes; use another checkpoint"
        ) from None


def check_weak(weak: Path, strong: Path, here: Any, there: Any, fields: Sequence[str]) -> None:
    """Raise MismatchError unless a weak model has the same inputs and outputs as the strong one.

    here, there: configurations of the two models. fields: names of the fields that must be equal.
    """
    for name in fields:
        if getattr(here, name) != getattr(there, name):
            raise MismatchError(
                f"weak model {weak}: model.{name} is {getattr(here, name)}, that of {strong} is "
                f"{getattr(there, name)}"
            )
    ours, theirs = saved.load_normaliser(weak), saved.load_normaliser(strong)
    if not (torch.equal(ours.mean, theirs.mean) and torch.equal(ours.std, theirs.std)):
        raise MismatchError(
            f"weak model {weak}: its features are normalised differently from those of {strong}"
        )


def weights_note(path: Path, name: str | None) -> dict[str, str]:
    """Describe the weights for the metadata of trajectories sampled with them."""
    return {"folder": str(path.resolve()), "ema": name or "raw"}


def best_device(device: str | torch.device | None) -> str | torch.device:
    """Return `device`, or by default CUDA if it is available, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
