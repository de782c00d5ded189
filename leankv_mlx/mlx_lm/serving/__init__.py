"""mlx-lm's server with compressed caches: what takes the place of its generation loop.

HTTP, chat templates, sampling and the batches themselves stay mlx-lm's. Ours is which request runs
when, what becomes of what fails or leaves, and what is said about the bytes.
"""
