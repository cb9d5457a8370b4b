"""The network of Trajectory Forcing, which Normalizing Trajectory Models can start from as well."""

from trainer.networks.trajectory_transformer import (
    Guidance,
    Prediction,
    TrajectoryTransformer,
    as_guidance,
    velocity,
)

__all__ = ["Guidance", "Prediction", "TrajectoryTransformer", "as_guidance", "velocity"]
