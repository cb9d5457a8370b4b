"""Input images: listing a data set, reading and decoding its files, and the label maps drawn for them."""
