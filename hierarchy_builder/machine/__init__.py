"""What this machine has: its processors, home and packages, its device, and whether all of it fits together."""
