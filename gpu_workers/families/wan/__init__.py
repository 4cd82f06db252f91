"""The transformers of Wan 2.1 and 2.2."""
