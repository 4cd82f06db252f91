"""The VAEs of Wan 2.1, Qwen-Image and Wan 2.2 TI2V, for images and videos."""
