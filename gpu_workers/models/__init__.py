"""What all families share: the registry, checkpoints as views of parameters, skeletons, components, checks."""
