"""Builds the nested regions of each image from its token features."""

from pathlib import Path

from hierarchy_builder.machine.process import place_numba_cache

place_numba_cache(Path(__file__).parent)  # before numba is imported

from hierarchy_builder.hierarchy.recipe import Flag, Hierarchy, build_hierarchy, check_nesting, cut_levels  # noqa: E402

__all__ = ["Flag", "Hierarchy", "build_hierarchy", "check_nesting", "cut_levels"]
