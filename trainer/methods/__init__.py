"""Training objectives: path, target and loss of each method; they know no attention."""
