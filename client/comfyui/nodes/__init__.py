"""The nodes, one module each."""
