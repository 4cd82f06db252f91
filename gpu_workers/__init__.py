"""The worker side: model families, skeletons, process groups, the xDiT pipeline. Imports torch and xfuser."""
