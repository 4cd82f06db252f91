"""FLUX.1's transformer, dev and schnell."""
