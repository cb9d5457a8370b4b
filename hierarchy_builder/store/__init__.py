"""Everything a build keeps on disk."""
