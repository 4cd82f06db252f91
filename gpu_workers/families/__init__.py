"""Model families, a folder each: what only one kind of checkpoint knows. No family imports another."""
