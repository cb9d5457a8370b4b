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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hierarchy_builder.errors import UsageError
from trainer.data.normalisation import RAW, Normaliser
from trainer.methods.normalizing_trajectory.chains import level_times, noise_covariance, noise_times
from trainer.methods.normalizing_trajectory.config import Ending, NormalizingMethodConfig
from trainer.methods.normalizing_trajectory.network import Gaussian, Given, NormalizingNetwork
from trainer.methods.normalizing_trajectory.objective import Chain, denoised, guided


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A network, and how trajectories are drawn from it and ended."""

    network: NormalizingNetwork
    method: NormalizingMethodConfig
    """That of the run."""
    num_steps: int
    """T, one of the numbers of transitions that the network was trained with."""
    ending: Ending = "score"
    """How the cleanest states are turned into canvases."""
    guidance: float = 0.0
    """Weight w of guidance on means and deviations; 0 turns it off."""

    @torch.no_grad()
    def canvases(
        self,
        label: Tensor,
        noise: Tensor,
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
        if self.guidance and not self.method.label_dropout:
            raise UsageError(
                "guidance was asked of a model trained without label dropout: leave it out, or train with "
                "method.label_dropout=0.1"
            )
        check_ending(self.network, self.ending)
        self.network.check(noise[0], self.num_steps)
        prev = torch.zeros_like(noise[0]) if previous is None else normaliser.apply(previous)
        canvases = []
        for level, own in enumerate(noise.chunk(self.network.config.drawn_levels)):
            if level >= start_level:
                prev = self.next_canvas(label, torch.full_like(label, level), prev, own)
                canvases.append(prev)
        return normaliser.undo(torch.stack(canvases, dim=1))

    def next_canvas(self, label: Tensor, level: Tensor, prev: Tensor, noise: Tensor) -> Tensor:
        """Draw the clean canvas [B, H, W, C] of one level, in units of the network. noise: that of the level alone."""
        given = Given(seen_label(label, self.network, self.method), level, prev)
        is_hierarchy = self.network.config.trajectory == "levels"
        return self._next_level(given, noise) if is_hierarchy else self._noise_trajectory(given, noise)

    def _predicted(self, u: Tensor, t: Tensor, s: Tensor, given: Given) -> Gaussian:
        """Return the distribution of the next state in u-space, with guidance."""
        law = self.network.predict(u, t, s, given, self.num_steps)
        if not self.guidance:
            return law
        null = given._replace(label=torch.full_like(given.label, self.network.config.num_classes))
        return guided(law, self.network.predict(u, t, s, null, self.num_steps), self.guidance)

    def states(self, times: Tensor, given: Given, noise: Tensor) -> Tensor:
        """Draw states in u-space, [B, T+1, H, W, C], the cleanest first.

        times: [B, T+1]. noise: [T+1, B, H, W, C]; the first is the state at t = 1.
        """
        states = [noise[0]]
        for k in range(self.num_steps, 0, -1):
            law = self._predicted(states[-1], times[:, k], times[:, k - 1], given)
            states.append(law.mean + law.log_sigma.exp() * noise[self.num_steps - k + 1])
        return torch.stack(states[::-1], dim=1)

    def _noise_trajectory(self, given: Given, noise: Tensor) -> Tensor:
        """Draw the clean canvas at the end of a trajectory, [B, H, W, C]. noise: [T+1, B, H, W, C]."""
        network, T, t_min = self.network, self.num_steps, self.method.sampling_t_min
        times = noise_times(noise.new_full((noise.shape[1],), t_min), T, math.prod(network.config.grid))
        u = self.states(times, given, noise)
        if self.ending == "denoiser":
            return network.denoise(u[:, 0], times[:, 0], given, T)
        if self.ending == "inverse":
            return network.untransport(u[:, 0], times[:, 0], given.level, T) / (1 - t_min)
        # The inverse of a state does not need the others, so all states form one batch.
        x = network.untransport(u[:, :-1].flatten(0, 1), times[:, :-1].flatten(), given.repeated(T).level, T)
        states = torch.cat([x.unflatten(0, (-1, T)), u[:, -1:]], dim=1)
        chain = Chain(states, times, given, noise_covariance(times), 1 - times[:, :-1])
        return denoised(network, chain, T)[:, 0]

    def _next_level(self, given: Given, noise: Tensor) -> Tensor:
        """Draw the clean canvas of a level, [B, H, W, C], from that of the level before.

        noise: [2, B, H, W, C], for the noisy state and for the draw.
        """
        network, T = self.network, self.num_steps
        L, sigma = network.config.num_levels, self.method.level_noise
        k = L - 1 - int(given.level[0])
        s, t = level_times(L, len(noise[0]), noise)[:, k : k + 2].unbind(1)
        if k == L - 1:
            before = u_t = torch.zeros_like(noise[0])
        else:
            before = given.prev + sigma * noise[0]
            u_t, _ = network.transport(before, t, given.level, T)
        law = self._predicted(u_t, t, s, given)
        u = law.mean + law.log_sigma.exp() * noise[1]
        if self.ending == "denoiser":
            return network.denoise(u, s, given, T)
        x = network.untransport(u, s, given.level, T)
        states, times = torch.stack([x, before], dim=1), torch.stack([s, t], dim=1)
        scale = torch.ones_like(times[:, :1])
        chain = Chain(states, times, given, (sigma**2 * scale)[..., None], scale)
        return denoised(network, chain, T)[:, 0]
