"""What all families share: the registry, checkpoints as views of parameters, models, components, checks."""
