"""Post-training by Fréchet distances: samples of a trained network move towards the statistics of real images."""
