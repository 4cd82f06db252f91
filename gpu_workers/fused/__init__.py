"""Transformer blocks as a checkpoint has them: whole projections, and one kernel for all that lies between two."""
