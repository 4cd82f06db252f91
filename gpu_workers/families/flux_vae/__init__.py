"""The VAE of FLUX.1."""
