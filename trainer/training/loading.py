"""From checkpoint folders to what a pipeline needs: weights in a network, the decoder, the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hierarchy_builder.errors import MismatchError
from trainer.decode.rae import RaeDecoder, find_decoder, load_decoder
from trainer.training import checkpoint as saved


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
            f"{path}: the weights are not of the network in {saved.STATE}; use another checkpoint"
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


def decoder_for(
    path: Path,
    encoder: dict[str, Any],
    decoder: Callable[[Tensor], Tensor] | str | Path | None,
    device: str | torch.device,
) -> Callable[[Tensor], Tensor] | None:
    """The decoder asked for, of a folder or as it is; else the one of the run at `path`, or the encoder's own."""
    if decoder is not None and not isinstance(decoder, str | Path):
        return decoder
    found = (
        find_decoder(saved.run_of(path), encoder) if decoder is None else load_decoder(Path(decoder), encoder)
    )
    return found.to(device) if isinstance(found, RaeDecoder) else found


def best_device(device: str | torch.device | None) -> str | torch.device:
    """The device asked for, else CUDA where there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
