"""Work across ranks: who works on which tokens and rows, attention, synchronisation of ranks, copies between GPUs."""
