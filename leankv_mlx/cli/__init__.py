"""The `leankv` command."""

from leankv_mlx.cli.app import main

__all__ = ["main"]
