"""Verbs chained into one job of a Ray cluster."""

from hierarchy_builder import __version__ as __version__
