"""Paged storage: a pool of blocks per layer and format, and tables that say who owns which."""

from leankv_mlx.blocks.pool import BlockPool
from leankv_mlx.blocks.table import Among, BlockTable

__all__ = ["Among", "BlockPool", "BlockTable"]
