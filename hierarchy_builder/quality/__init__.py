"""How good a build is, and what it looks like."""
