"""Verbs chained into one job of a Ray cluster."""
