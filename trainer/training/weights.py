"""Running averages of the weights, and how weights of a checkpoint come into a network."""

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


def average_of(config: Any, ema: float | str | None) -> str | None:
    """Name of the weight average meant by `ema` in a run of `config`; None for the raw weights.

    ema: half-life in thousands of images, `auto` for the first one trained, None or `raw` for the raw weights.
    """
    if ema == "auto":
        ema = config.optim.ema_halflives_kimg[0] if config.optim.ema_halflives_kimg else None
    return None if ema in (None, "raw") else str(ema) if isinstance(ema, str) else f"{ema:g}"


def fill(network: nn.Module, path: Path, name: str | None) -> None:
    """Give a network the weights of a checkpoint. Raises MismatchError if they are of another shape."""
    try:
        network.load_state_dict(saved.load_weights(path, name))
    except RuntimeError:
        raise MismatchError(
            f"{path}: the weights do not fit the network that {saved.STATE} describes; use another checkpoint"
        ) from None


def check_weak(weak: Path, strong: Path, here: Any, there: Any, fields: Sequence[str]) -> None:
    """That the model of a weak checkpoint sees and draws what the strong one does, whatever its width and depth.

    here, there: configurations of the two models. fields: those that have to agree. Raises MismatchError.
    """
    for name in fields:
        if getattr(here, name) != getattr(there, name):
            raise MismatchError(
                f"weak model {weak}: model.{name} is {getattr(here, name)}, that of {strong} is "
                f"{getattr(there, name)}"
            )
    ours, theirs = saved.load_normaliser(weak), saved.load_normaliser(strong)
    if not (torch.equal(ours.mean, theirs.mean) and torch.equal(ours.std, theirs.std)):
        raise MismatchError(f"weak model {weak}: it sees features normalised otherwise than {strong}")


def weights_note(path: Path, name: str | None) -> dict[str, str]:
    """What trajectories say about the weights that drew them."""
    return {"folder": str(path.resolve()), "ema": name or "raw"}


def best_device(device: str | torch.device | None) -> str | torch.device:
    """The device asked for, else CUDA where there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
