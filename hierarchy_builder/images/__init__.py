"""Input images: listing a data set, reading and decoding its files, and the label maps drawn for them."""

from pathlib import Path

from hierarchy_builder.machine.process import place_numba_cache

place_numba_cache(Path(__file__).parent)  # before numba is imported
