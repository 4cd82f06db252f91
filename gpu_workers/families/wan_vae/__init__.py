"""The VAE of Wan 2.1 and Qwen-Image, for single images."""
