"""Attention over a compressed sequence: from codes in decode, over a working copy in prefill."""

from leankv_mlx.attention.decode import attend_codes
from leankv_mlx.attention.prefill import attend_rows
from leankv_mlx.attention.view import View

__all__ = ["View", "attend_codes", "attend_rows"]
