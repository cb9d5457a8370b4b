"""The training loop, optimisers, checkpoints and run folders that all methods use."""
