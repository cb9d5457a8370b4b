"""Builds the nested regions of each image from its token features."""

from hierarchy_builder.hierarchy.recipe import Flag, Hierarchy, build_hierarchy, check_nesting, cut_levels

__all__ = ["Flag", "Hierarchy", "build_hierarchy", "check_nesting", "cut_levels"]
