"""The command `hierarchy-builder`."""
