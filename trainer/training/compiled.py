"""The objective as one compiled graph, tangents included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hierarchy_builder.errors import TrainerError

Objective = Callable[..., dict[str, Tensor]]


def compiled(objective: Objective) -> Objective:
    """`objective` compiled without a break of the graph, once for every shape.

    A call raises TrainerError where this machine cannot compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # loading it takes as long as torch itself

    fast = torch.compile(objective, fullgraph=True, dynamic=False)

    def call(*inputs: Any, **named: Any) -> dict[str, Tensor]:
        try:
            return fast(*inputs, **named)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise TrainerError(f"compile: {reason}; train with --set compile=false") from error

    return call
