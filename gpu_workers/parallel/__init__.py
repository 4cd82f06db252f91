"""Work across ranks: shares of tokens and rows, attention, agreement, copies between GPUs."""
