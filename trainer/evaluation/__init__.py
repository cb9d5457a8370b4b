"""Metrics, studies and pages of a trained model."""
