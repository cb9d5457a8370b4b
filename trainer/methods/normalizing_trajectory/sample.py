"""Sampling of canvases along a trajectory: T network evaluations in u-space, then one of three ways to features.

    B images, T transitions, L levels, H×W grid, C channels

    inverse     the transporter's inverse, token by token; the noise of the cleanest state remains; not for levels
    score       the inverse of all states, then their noise removed by the trajectory's own score
    denoiser    the learned denoiser: no inverse and no gradient

Levels are drawn one after the other, each from the clean canvas before it. Later levels depend only on that canvas and
on their own noise, so trajectories can be edited and resumed.

Source: Normalizing Trajectory Models (2026), arXiv 2605.08078, Algorithm 2; a hierarchy as the trajectory is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.data.normalisation import RAW, Normaliser
from trainer.methods.normalizing_trajectory.chains import level_times, noise_covariance, noise_times
from trainer.methods.normalizing_trajectory.config import Ending, NormalizingMethodConfig
from trainer.methods.normalizing_trajectory.network import Gaussian, Given, NormalizingNetwork
from trainer.methods.normalizing_trajectory.objective import Chain, denoised, guided


@dataclass(frozen=True, kw_only=True, slots=True)
class HowToSample:
    """How trajectories are drawn and ended."""

    num_steps: int
    """T, one of the numbers of transitions that the network was trained with."""
    ending: Ending = "score"
    """How the cleanest states are turned into canvases."""
    guidance: float = 0.0
    """Weight w of guidance on means and deviations; 0 turns it off."""


def seen_label(label: Tensor, network: NormalizingNetwork, method: NormalizingMethodConfig) -> Tensor:
    """Return labels as training showed them: the null class for a network trained without labels."""
    return torch.full_like(label, network.config.num_classes) if method.label_dropout == 1 else label


def check_ending(network: NormalizingNetwork, ending: Ending) -> None:
    """Raise UsageError for an ending that a network does not have."""
    if ending == "denoiser" and network.denoiser is None:
        raise UsageError(
            "ending 'denoiser': the model has none; train one with --set distil_from=RUN, or end by inverse or score"
        )
    if ending == "inverse" and network.config.trajectory == "levels":
        raise UsageError(
            "ending 'inverse': it leaves the noise of a level in, and the next level of trajectory 'levels' would take "
            "it for the canvas; end by score or denoiser"
        )


def num_noises(network: NormalizingNetwork, num_steps: int) -> int:
    """Return the canvases of noise for one image: T + 1 for tokens, T + 1 per level for canvases, 2·L for levels."""
    config = network.config
    return config.drawn_levels * (2 if config.trajectory == "levels" else num_steps + 1)


@torch.no_grad()
def sample_canvases(
    network: NormalizingNetwork,
    method: NormalizingMethodConfig,
    label: Tensor,
    noise: Tensor,
    how: HowToSample,
    *,
    start_level: int = 0,
    previous: Tensor | None = None,
    normaliser: Normaliser = RAW,
) -> Tensor:
    """Sample canvases: float32 [B, L − start_level, H, W, C], with L = 1 where tokens alone are modelled.

    label: int64 [B]. noise: float32 [num_noises, B, H, W, C]. previous: canvas of level start_level − 1, to resume.
    normaliser: that of the run; canvases are raw features. Raises UsageError if guidance is not for the network,
    MismatchError for a number of transitions it was not trained with.
    """
    if how.guidance and not method.label_dropout:
        raise UsageError(
            "guidance was asked of a model trained without label dropout: leave it out, or train with "
            "method.label_dropout=0.1"
        )
    check_ending(network, how.ending)
    network.check(noise[0], how.num_steps)
    prev = torch.zeros_like(noise[0]) if previous is None else normaliser.apply(previous)
    label = seen_label(label, network, method)
    num_levels = network.config.drawn_levels
    each, canvases = len(noise) // num_levels, []
    for level in range(start_level, num_levels):
        given = Given(label, torch.full_like(label, level), prev)
        prev = next_canvas(network, method, given, noise[level * each : (level + 1) * each], how)
        canvases.append(prev)
    return normaliser.undo(torch.stack(canvases, dim=1))


def next_canvas(
    network: NormalizingNetwork,
    method: NormalizingMethodConfig,
    given: Given,
    noise: Tensor,
    how: HowToSample,
) -> Tensor:
    """Draw the clean canvas [B, H, W, C] of one level, in units of the network. noise: that of the level alone."""
    draw = _next_level if network.config.trajectory == "levels" else _noise_trajectory
    return draw(network, method, given, noise, how)


def predicted(
    network: NormalizingNetwork, u: Tensor, t: Tensor, s: Tensor, given: Given, how: HowToSample
) -> Gaussian:
    """Return the distribution of the next state in u-space, with guidance."""
    law = network.predict(u, t, s, given, how.num_steps)
    if not how.guidance:
        return law
    null = given._replace(label=torch.full_like(given.label, network.config.num_classes))
    return guided(law, network.predict(u, t, s, null, how.num_steps), how.guidance)


def draw_states(
    network: NormalizingNetwork, times: Tensor, given: Given, noise: Tensor, how: HowToSample
) -> Tensor:
    """Draw states in u-space, [B, T+1, H, W, C], the cleanest first.

    times: [B, T+1]. noise: [T+1, B, H, W, C]; the first is the state at t = 1.
    """
    states = [noise[0]]
    for k in range(how.num_steps, 0, -1):
        law = predicted(network, states[-1], times[:, k], times[:, k - 1], given, how)
        states.append(law.mean + law.log_sigma.exp() * noise[how.num_steps - k + 1])
    return torch.stack(states[::-1], dim=1)


def _noise_trajectory(
    network: NormalizingNetwork,
    method: NormalizingMethodConfig,
    given: Given,
    noise: Tensor,
    how: HowToSample,
) -> Tensor:
    """Draw the clean canvas at the end of a trajectory, [B, H, W, C]. noise: [T+1, B, H, W, C]."""
    T, H, W = how.num_steps, *network.config.grid
    t_min = noise.new_full((noise.shape[1],), method.sampling_t_min)
    times = noise_times(t_min, T, H * W)
    u = draw_states(network, times, given, noise, how)
    if how.ending == "denoiser":
        return network.denoise(u[:, 0], times[:, 0], given, T)
    if how.ending == "inverse":
        return network.untransport(u[:, 0], times[:, 0], given.level, T) / (1 - method.sampling_t_min)
    # The inverse of a state does not need the others, so all states form one batch.
    x = network.untransport(u[:, :-1].flatten(0, 1), times[:, :-1].flatten(), given.repeated(T).level, T)
    states = torch.cat([x.unflatten(0, (-1, T)), u[:, -1:]], dim=1)
    chain = Chain(states, times, given, noise_covariance(times), 1 - times[:, :-1])
    return denoised(network, chain, T)[:, 0]


def _next_level(
    network: NormalizingNetwork,
    method: NormalizingMethodConfig,
    given: Given,
    noise: Tensor,
    how: HowToSample,
) -> Tensor:
    """Draw the clean canvas of a level, [B, H, W, C], from that of the level before.

    noise: [2, B, H, W, C], for the noisy state and for the draw.
    """
    L, sigma = network.config.num_levels, method.level_noise
    k = L - 1 - int(given.level[0])
    s, t = level_times(L, len(noise[0]), noise)[:, k : k + 2].unbind(1)
    if k == L - 1:
        before = u_t = torch.zeros_like(noise[0])
    else:
        before = given.prev + sigma * noise[0]
        u_t, _ = network.transport(before, t, given.level, how.num_steps)
    law = predicted(network, u_t, t, s, given, how)
    u = law.mean + law.log_sigma.exp() * noise[1]
    if how.ending == "denoiser":
        return network.denoise(u, s, given, how.num_steps)
    x = network.untransport(u, s, given.level, how.num_steps)
    states, times, scale = (
        torch.stack([x, before], dim=1),
        torch.stack([s, t], dim=1),
        torch.ones_like(s)[:, None],
    )
    chain = Chain(states, times, given, (sigma**2 * scale)[..., None], scale)
    return denoised(network, chain, how.num_steps)[:, 0]
