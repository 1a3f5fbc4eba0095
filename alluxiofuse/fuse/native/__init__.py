"""A FUSE session of our own: reads and answers /dev/fuse itself."""
