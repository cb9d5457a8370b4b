"""Verbs of hierarchy_builder and trainer chained into jobs of a Ray cluster."""
