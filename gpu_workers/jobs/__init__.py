"""Running one job on a rank: inputs, outputs, progress and cancellation."""
