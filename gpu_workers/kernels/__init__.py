"""Triton and CUDA pieces that know no model."""
