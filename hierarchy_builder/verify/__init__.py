"""Whether a build holds what it promises, and how it is repaired."""
