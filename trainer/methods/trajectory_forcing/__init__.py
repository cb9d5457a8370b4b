"""Trajectory Forcing: one-step flows from each level of a hierarchy to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.methods.trajectory_forcing.objective import loss

__all__ = ["loss"]


def __getattr__(name: str) -> Any:
    """Load the objective, and with it torch, on first use, so that presets are listed without it."""
    if name == "loss":
        from trainer.methods.trajectory_forcing import objective

        return objective.loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
