"""The language model of Qwen2.5-VL, Qwen-Image's text encoder."""
