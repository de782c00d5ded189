"""mlx-lm's own commands with one more flag, `--kv`: a file and a class for each.

Nothing of mlx-lm is copied: a `main` runs as it is, with the names that it looks up in its own
module replaced for the time of the run.
"""

from leankv_mlx.mlx_lm.commands.benchmark import Benchmark
from leankv_mlx.mlx_lm.commands.cache_prompt import CachePrompt
from leankv_mlx.mlx_lm.commands.chat import Chat
from leankv_mlx.mlx_lm.commands.generate import Generate, run_generate
from leankv_mlx.mlx_lm.commands.server import Server, run_serve
from leankv_mlx.mlx_lm.commands.session import Session, hooked, print_summary

SESSIONS: dict[str, type[Session]] = {
    "benchmark": Benchmark,
    "cache_prompt": CachePrompt,
    "chat": Chat,
    "generate": Generate,
    "server": Server,
}
"""What a run of each command is; their names are those of `hook.COMMANDS`."""

__all__ = ["SESSIONS", "Session", "hooked", "print_summary", "run_generate", "run_serve"]
