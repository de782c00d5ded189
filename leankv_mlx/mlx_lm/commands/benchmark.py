"""`mlx_lm.benchmark` with `--kv`."""

from __future__ import annotations

import argparse

from leankv_mlx.config import UNCOMPRESSED
from leankv_mlx.errors import UsageError
from leankv_mlx.mlx_lm.commands.session import Session


class Benchmark(Session):
    """One run of it."""

    def accept(self, args: argparse.Namespace) -> None:
        """A compressed cache holds one sequence."""
        super().accept(args)
        if self.config is not None and args.batch_size != 1:
            raise UsageError(
                f"--batch-size {args.batch_size} does not work with --kv {args.kv}: a compressed "
                f"cache holds one sequence; use --batch-size 1, or --kv {UNCOMPRESSED}."
            )
