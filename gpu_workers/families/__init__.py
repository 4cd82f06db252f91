"""Model families: the code for one kind of checkpoint each. No family imports another."""
