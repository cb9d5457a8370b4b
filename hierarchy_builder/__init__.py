"""Teacher hierarchies: images → features → nested regions → shards of level canvases."""

__version__ = "0.1.0"
