"""The VAE of FLUX.2."""
