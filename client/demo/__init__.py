"""``xditd demo``: generated checkpoints, a daemon of its own, two images, and a comparison with diffusers."""
