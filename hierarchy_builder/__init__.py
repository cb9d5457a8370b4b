"""Teacher hierarchies: images → features → nested regions → shards of level canvases."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hierarchy_builder.build.calls import build_shards as build  # noqa: F401 (what calling the package of that name does)
    from hierarchy_builder.build.calls import build_shards as build_shards
    from hierarchy_builder.canvases import level_canvases as level_canvases
    from hierarchy_builder.config import HierarchyRecipe as HierarchyRecipe
    from hierarchy_builder.hierarchy import Hierarchy as Hierarchy
    from hierarchy_builder.hierarchy import build_hierarchy as build_hierarchy

__version__ = "0.1.0"
"""Version of the whole project; pyproject.toml and the other packages take it from here."""

HOMES = {
    "Hierarchy": "hierarchy",
    "HierarchyRecipe": "config",
    "build_hierarchy": "hierarchy",
    "build_shards": "build.calls",
    "level_canvases": "canvases",
}
"""The module of each public name, which is loaded on first use so that `import hierarchy_builder` stays light."""
__all__ = ["Hierarchy", "HierarchyRecipe", "build_hierarchy", "build_shards", "level_canvases"]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"hierarchy_builder.{HOMES[name]}"), name)
    if name == "build":  # the package of that name, which can be called
        return import_module("hierarchy_builder.build")
    raise AttributeError(f"module 'hierarchy_builder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
