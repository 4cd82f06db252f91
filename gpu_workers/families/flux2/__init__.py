"""FLUX.2's transformer: dev, klein 4B and 9B."""
