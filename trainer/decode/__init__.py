"""Canvases → pixels."""
