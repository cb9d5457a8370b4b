"""Level canvases, made from regions and features, and the colours, cards and pages that show them."""

from hierarchy_builder.canvases.means import level_canvases, region_means

__all__ = ["level_canvases", "region_means"]
