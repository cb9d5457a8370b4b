"""Exact likelihoods of real images under a run of Normalizing Trajectory Models, in bits by transition and token.

    B images, K transitions of a chain, L levels, H×W grid, C channels, N = H·W tokens

Densities are those of features in their own units with the noise of the chain: standard deviation t_min on
(1 − t_min) times the features, or `level_noise` on every canvas, both in units of normalised features. The density
of a chain of states is exact. The cost of a single state at t_min is at most E[−log p(chain)] − H(chain | state), an
upper bound. No density of a state can be sharper than the noise on it, so

    added bits = bits of a transition − log₂(c·√(2πe)),   c the deviation of that state, given the one before and the
                                                          clean canvas

measure the information of the transition: they are at least 0 on average, and independent of the features' unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.errors import NonFiniteLossError, UsageError
from hierarchy_builder.progress import Follow, unseen
from hierarchy_builder.records import spread_evenly
from trainer.data.reader import ShardReader
from trainer.data.shards import ShardIndex
from trainer.methods.normalizing_trajectory.chains import chain_entropy, noise_times, posterior
from trainer.methods.normalizing_trajectory.objective import HALF_LOG_2PI, Chain, build_chain, transitions
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.methods.normalizing_trajectory.sample import seen_label
from trainer.seeds import level_noise, mixed_seed

MEASURED_TOGETHER = 16
"""Images that pass the network at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """The bits of one image, level by level, coarse → fine; with trajectory `tokens` there is one level.

    With trajectory `levels`, the only transition of level ℓ is p(z^ℓ | z^(ℓ−1)); else each level has T, clean → noisy.
    """

    key: str
    number: int
    label: int
    regions: np.ndarray
    """uint8 [L−1, H, W]."""
    bits: np.ndarray
    """float32 [levels, K, H, W]: bits of each token in each transition; sums over tokens are exact."""
    added: np.ndarray
    """float32 [levels, K, H, W]: the same minus the cost of the noise alone."""
    bound: np.ndarray
    """float32 [levels]: upper bound of the bits of the level's cleanest state, which is exact for `levels`."""
    moments: np.ndarray
    """float32 [L, 2, C]: mean and mean square of the tokens of every canvas, normalised, without noise."""

    @property
    def added_total(self) -> float:
        """Added bits of the whole image; images with more of them are more surprising."""
        return float(self.added.sum())

    def region_bits(self) -> list[list[float]]:
        """Return added bits by level and region id; every token of the last level is a region."""
        per_level = self.added.sum(axis=1)
        finest = np.arange(per_level[0].size).reshape(1, *per_level.shape[1:])
        ids = np.concatenate([self.regions.astype(np.int64), finest])[-len(per_level) :]
        pairs = zip(ids, per_level, strict=True)
        return [np.bincount(i.ravel(), weights=b.ravel()).tolist() for i, b in pairs]


def measure(
    pipe: NormalizingPipeline, index: ShardIndex, numbers: list[int], num_steps: int = 1
) -> Iterator[Measured]:
    """Measure the likelihood of images of the shards, given by their numbers and conditioned on their classes.

    num_steps: T; 1 takes the first number that the network was trained with. Noise depends only on an image's number,
    so batches do not change a result. Raises NonFiniteLossError, naming image and seed, for a density that is not
    finite.
    """
    reader = ShardReader(index)
    T = pipe.default_steps if num_steps == 1 else num_steps
    for start in range(0, len(numbers), MEASURED_TOGETHER):
        part = numbers[start : start + MEASURED_TOGETHER]
        rows = reader.read_rows(part)
        canvases = rows.canvases(pipe.normaliser.to("cpu"))
        found = _levels(pipe, canvases, rows.label, part, T)
        moments = torch.stack([canvases.mean(dim=(2, 3)), canvases.square().mean(dim=(2, 3))], dim=2).numpy()
        for row, (number, key) in enumerate(zip(part, rows.keys, strict=True)):
            bits, added, bound = (value[row].numpy() for value in found)
            if not np.isfinite(bits).all():
                raise NonFiniteLossError(
                    f"{key}: log-likelihood is not finite (noise of seed {_seed(number)}, {index.url}); use another "
                    "checkpoint, or train with a lower optim.lr"
                )
            yield Measured(
                key=key,
                number=number,
                label=int(rows.label[row]),
                regions=rows.regions[row].numpy(),
                bits=bits,
                added=added,
                bound=bound,
                moments=moments[row],
            )
    reader.close()


def likelihood(
    pipe: Any, index: ShardIndex, max_real: int = 10_000, num_steps: int = 1, follow: Follow = unseen
) -> tuple[list[tuple[str, float]], list[Measured]]:
    """Return (name, value) of each metric, a mean over at most `max_real` evenly spread images, and these images.

    bits_per_dim: exact bits of a chain of states, per number of all its states. bits_per_dim_bound, for noise chains:
    the upper bound for the cleanest state. The same names with _gaussian: the bits that independent Gaussians need, see
    `gaussian_bits`. added_bits_per_dim: see above, of the whole chain and all levels per number of one canvas. Metrics
    are also given by level, and added bits of noise chains by transition, clean → noisy. noise: standard deviation of
    the noise on the measured features, in units of normalised features. follow: reports progress.
    Raises UsageError for a run of another method.
    """
    if not isinstance(pipe, NormalizingPipeline):
        raise UsageError(
            "likelihoods are exact for runs of normalizing-trajectory only: leave out --likelihood"
        )
    chosen = spread_evenly(index.num_samples, max_real)
    images = list(follow(measure(pipe, index, chosen, num_steps), "measuring", len(chosen)))
    config, dims = pipe.model.config, math.prod(pipe.model.config.grid) * pipe.model.config.in_channels
    bits = np.stack([image.bits.sum(axis=(2, 3)) for image in images]).mean(axis=0) / dims
    added = np.stack([image.added.sum(axis=(2, 3)) for image in images]).mean(axis=0) / dims
    bound = np.stack([image.bound for image in images]).mean(axis=0) / dims
    gaussian, cleanest = gaussian_bits(pipe, images)
    is_hierarchy = config.trajectory == "levels"
    rows = [("noise", pipe.method.level_noise if is_hierarchy else pipe.method.sampling_t_min)]
    rows += [("bits_per_dim", float(bits.mean())), ("bits_per_dim_gaussian", float(gaussian.mean()))]
    if not is_hierarchy:
        rows += [("bits_per_dim_bound", float(bound.mean()))]
        rows += [("bits_per_dim_bound_gaussian", float(cleanest.mean()))]
    rows += [("added_bits_per_dim", float(added.sum()))]
    if len(bits) > 1:
        rows += [(f"bits_per_dim_level_{level}", float(v)) for level, v in enumerate(bits.mean(axis=1))]
        rows += [(f"bits_per_dim_gaussian_level_{level}", float(v)) for level, v in enumerate(gaussian)]
        rows += [(f"added_bits_per_dim_level_{level}", float(v)) for level, v in enumerate(added.sum(axis=1))]
    if bits.shape[1] > 1:
        rows += [(f"added_bits_per_dim_step_{k}", float(value)) for k, value in enumerate(added.mean(axis=0))]
    return rows, images


@torch.no_grad()
def _levels(
    pipe: NormalizingPipeline, canvases: Tensor, label: Tensor, numbers: list[int], num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (bits, added, bound) of a batch: twice [B, levels, K, H, W], and [B, levels]."""
    config, device = pipe.model.config, pipe.device
    label, canvases = seen_label(label.to(device), pipe.model, pipe.method), canvases.to(device)
    num_chains = config.num_levels if config.trajectory == "canvases" else 1
    seeds = [_seed(number) for number in numbers]
    noise = level_noise(seeds, num_chains * (num_steps + 1), config.grid, config.in_channels)
    nats, floors, bounds = [], [], []
    for level, own in enumerate(noise.to(device).transpose(0, 1).split(num_steps + 1, dim=1)):
        chain = build_chain(
            canvases,
            label,
            torch.full_like(label, level),
            noise=own,
            t_min=torch.full((len(label),), pipe.method.sampling_t_min, device=device),
            trajectory=config.trajectory,
            level_noise=pipe.method.level_noise,
        )
        found = transitions(pipe.model, chain.states, chain.times, chain.given, num_steps).nats()
        nats.append(found)
        floors.append(_floor(chain, pipe, config.in_channels))
        bounds.append(found.sum(dim=(1, 2, 3)) + _last_state(chain))
    scale = _log_volume(pipe).to(device)  # nats of a token that the units of its features account for
    bits, added = torch.stack(nats, dim=1) + scale, torch.stack(nats, dim=1) - torch.stack(floors, dim=1)
    bound = torch.stack(bounds, dim=1) + scale.expand(config.grid).sum()
    if config.trajectory == "levels":  # the chain runs through the levels, with one transition each
        bits, added = (value[:, 0].flip(1)[:, :, None] for value in (bits, added))
        bound = bits.sum(dim=(2, 3, 4))
    return tuple(value.cpu() / math.log(2) for value in (bits, added, bound))  # type: ignore[return-value]


def _floor(chain: Chain, pipe: NormalizingPipeline, channels: int) -> Tensor:
    """Return the least nats of a token, which the noise of each state costs, [B, K, 1, 1]."""
    if pipe.model.config.trajectory == "levels":
        deviation = torch.full_like(chain.times[:, 1:], pipe.method.level_noise)
    else:
        deviation = posterior(chain.times[:, 1:], chain.times[:, :-1]).c
    return (channels * (HALF_LOG_2PI + 0.5 + deviation.log()))[..., None, None]


def _last_state(chain: Chain) -> Tensor:
    """Return −log p(x_T) − H(states 1 … T | state 0) in nats, [B]; it turns a chain into a bound on its first state."""
    last = chain.states[:, -1].flatten(1)
    return (0.5 * last.square() + HALF_LOG_2PI).sum(dim=1) - chain_entropy(chain.times) * last.shape[1]


def _log_volume(pipe: NormalizingPipeline) -> Tensor:
    """Return ln of the volume of a unit of normalised features in the features' own units, by token: [] or [H, W]."""
    std = pipe.normaliser.std
    channels = pipe.model.config.in_channels
    return std.log().sum(dim=-1) if std.ndim else channels * std.log()


def gaussian_bits(pipe: NormalizingPipeline, images: list[Measured]) -> tuple[np.ndarray, np.ndarray]:
    """What independent Gaussians, one for each channel, need for the chains of `images`, and for their cleanest states.

    Bits per number of all states and of the first one, in units of features, float64 [levels] each. Means and variances
    of clean canvases are those of training for tokens (their own where the run knows none), and each level's own over
    `images` for canvases; the noise of the chain is the same for all. Expected over that noise, in closed form.
    """
    config, num_steps = pipe.model.config, images[0].bits.shape[1]
    mean, square = np.stack([image.moments for image in images]).mean(axis=0, dtype=np.float64).swapaxes(0, 1)
    own = square - mean**2
    if config.trajectory == "levels":  # one state of each level, whatever came before it
        noisy = own + pipe.method.level_noise**2
        chain = cleanest = _cross_entropy(noisy, noisy).mean(axis=1)
    else:
        t_min = torch.tensor([pipe.method.sampling_t_min], dtype=torch.float64)
        times = noise_times(t_min, num_steps, math.prod(config.grid))[0].numpy()
        if config.trajectory == "canvases":
            seen, variance = own, own
        elif pipe.normaliser.std.ndim:  # tokens had mean 0 and variance 1 in training
            seen, variance = square[-1:], np.ones_like(square[-1:])
        else:
            seen, variance = own[-1:], own[-1:]
        chain, cleanest = _gaussian_chain(seen, variance, times)
    volume = float(_log_volume(pipe).mean()) / config.in_channels
    return (chain + volume) / math.log(2), (cleanest + volume) / math.log(2)


def _gaussian_chain(
    seen: np.ndarray, variance: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nats per number of states 0 … T−1 of noise chains given the last one, and of state 0 alone: [levels] each.

    seen: mean square of clean numbers around the mean of their Gaussian, whose `variance` is given: [levels, C]. times:
    t_0 … t_T. x_t = α·x_s + σ·e makes p(x_s | x_t) = N(g·x_t, V_s·σ²/V_t), g = α·V_s/V_t, V_t = (1−t)²·variance + t².
    """
    s, t = times[:-1], times[1:]
    alpha = (1 - t) / (1 - s)
    V, Q = ((1 - times) ** 2 * moment[..., None] + times**2 for moment in (variance, seen))
    gain = alpha * V[..., :-1] / V[..., 1:]
    left = V[..., :-1] * (t**2 - (alpha * s) ** 2) / V[..., 1:]
    error = Q[..., :-1] * (1 - 2 * gain * alpha) + gain**2 * Q[..., 1:]
    return _cross_entropy(error, left).mean(axis=(1, 2)), _cross_entropy(Q[..., 0], V[..., 0]).mean(axis=1)


def _cross_entropy(seen: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Nats of a number whose mean square is `seen`, under N(0, variance)."""
    return HALF_LOG_2PI + 0.5 * (np.log(variance) + seen / variance)


def _seed(number: int) -> int:
    return mixed_seed(number, 7)
