"""Prototypes of a whole data set."""
