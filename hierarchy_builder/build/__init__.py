"""A build, stage by stage. As a function, `hierarchy_builder.build(photos, out, encoder=…)`, it runs them all."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Build(ModuleType):
    """Python binds `hierarchy_builder.build` to this package, so the package is what people can call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("hierarchy_builder.build.calls").build_shards(*args, **kwargs)


sys.modules[__name__].__class__ = _Build
