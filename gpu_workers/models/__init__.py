"""The engine of all model families: registry, checkpoint matching, model cache, lent components, checks."""
