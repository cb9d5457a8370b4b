"""Sizes that no network has are refused by the configuration of every method."""

from __future__ import annotations

import pytest

from hierarchy_builder.errors import UsageError
from trainer.methods.registry import METHODS
from trainer.training.config import with_settings

CONFIGS = {name: method.load("config")() for name, method in METHODS.items()}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("width", 480_000_000, "width is 480000000, expected above 0 and at most 1,000,000"),
        ("num_heads", 0, "num_heads is 0, expected above 0"),
        ("depth", 1_001, "depth is 1001, expected above 0 and at most 1,000"),
        ("num_class_tokens", -1, "num_class_tokens is -1, expected 0 to 1,000,000"),
        ("grid", [16, 2_000], "a side of the grid is 2000"),
        ("rope_theta", float("inf"), "rope_theta is inf, expected above 0, and finite"),
        ("norm_eps", 1.0, "norm_eps is 1.0, expected 0 up to below 1"),
        ("width", 100, "expected a multiple of 4 × num_heads"),
    ],
)
def test_impossible_size_is_refused(method: str, field: str, value: object, text: str) -> None:
    settings = {f"model.{field}": value}
    if value == 480_000_000:
        settings["model.num_heads"] = 12
    with pytest.raises(UsageError, match=text):
        with_settings(CONFIGS[method], settings)
