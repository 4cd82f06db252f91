"""The worker side: model families, models, process groups, the xDiT pipeline. Imports torch and xfuser."""
