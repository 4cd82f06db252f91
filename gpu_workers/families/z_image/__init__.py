"""Z-Image's transformer, Turbo and Base."""
