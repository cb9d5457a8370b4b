"""A build, stage by stage."""
