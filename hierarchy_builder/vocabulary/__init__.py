"""Prototypes of the parts of all images of a data set."""
