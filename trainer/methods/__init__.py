"""One folder per method, and the registry that names their parts."""
