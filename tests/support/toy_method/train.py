"""Training of the toy method: the mean squared error of canvases."""

from __future__ import annotations

import torch
from torch import Tensor

from toy_method.network import ToyNetwork
from toy_method.pipeline import ToyPipeline
from trainer.data.stream import Batch
from trainer.seeds import StepRows
from trainer.training.method_run import MethodRun


def squared_error(network: ToyNetwork, canvas: Tensor, label: Tensor, level: Tensor) -> dict[str, Tensor]:
    """The objective."""
    return {"loss": (network(label, level) - canvas).square().mean()}


class ToyRun(MethodRun):
    """One run of the toy method."""

    terms = ("loss",)
    shown = ("loss",)
    pipeline = ToyPipeline
    loss_function = staticmethod(squared_error)

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(self.model.named_parameters()), lr=self.config.optim.lr, weight_decay=0.0
        )

    def _rate(self) -> float:
        return self.config.optim.lr

    def _terms(self, part: Batch, rows: StepRows) -> dict[str, Tensor]:
        canvas, _, _ = part.targets(self.normaliser)
        return self.objective(self.model, canvas, part.label, part.level)
