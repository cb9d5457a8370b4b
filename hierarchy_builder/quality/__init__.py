"""Scores of the hierarchies of a build, comparisons of builds, and their HTML pages."""
