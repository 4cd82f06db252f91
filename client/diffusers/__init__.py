"""``accelerate(pipe)``: run the models of a diffusers pipeline on the daemon's workers."""
