"""Language models whose hidden states are text embeddings: Qwen3 and Mistral Small 3."""
