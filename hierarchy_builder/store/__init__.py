"""Files that a build writes, and how they are read."""
