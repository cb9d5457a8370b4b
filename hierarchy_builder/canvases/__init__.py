"""Level canvases (regions × features) and everything that is drawn from them."""

from hierarchy_builder.canvases.means import level_canvases, region_means

__all__ = ["level_canvases", "region_means"]
