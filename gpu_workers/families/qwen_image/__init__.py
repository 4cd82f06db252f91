"""Qwen-Image's transformer: Qwen-Image, 2512, Edit, Edit-2509 and Edit-2511."""
