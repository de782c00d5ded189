"""How fast it is: kernels, decode steps, prefill and encoding beside mlx-lm's own caches."""
