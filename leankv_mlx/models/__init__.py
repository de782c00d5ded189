"""Models that are not mlx-lm folders: GGUF files."""
