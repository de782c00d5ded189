"""What a server says about its bytes: `GET /v1/kv`, and a line a minute in its log."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from leankv_mlx.serving import Held, PromptStore

_EVERY_S, _LINE_S = 1.0, 60.0


@dataclass
class Counts:
    """What a server has done since it started.

    Attributes:
        finished: requests that were answered to the end.
        failed: those that ended with an error after they had begun.
        left: those whose client did not wait for the end.
        read: tokens of prompts that went through the model.
        generated: tokens of replies.
    """

    finished: int = 0
    failed: int = 0
    left: int = 0
    read: int = 0
    generated: int = 0


@dataclass
class Report:
    """What was last seen; the threads of connections read it while the loop goes on.

    Attributes:
        facts: of the model that is served.
        counts: go on by themselves.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    _seen: dict[str, Any] = field(default_factory=dict)
    _looked_at: float = -_EVERY_S
    _line_at: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._looked_at >= _EVERY_S

    def look(self, held: Held, running: int, waiting: int, store: PromptStore) -> None:
        """Note what is held now."""
        self._looked_at = time.monotonic()
        self._seen = {
            "sequences": {"running": running, "waiting": waiting, "stored": len(store)},
            "tokens": held.tokens,
            "bytes": held.used,
            "fp16_bytes": held.fp16,
            "shared_bytes": held.shared,
            "hits": store.hits,
            "misses": store.misses,
            "reused_tokens": store.reused,
        }

    def content(self) -> dict[str, Any]:
        """For JSON; bytes are those of the buffers."""
        counts = self.counts
        requests = {"finished": counts.finished, "failed": counts.failed, "left": counts.left}
        tokens = {"read_tokens": counts.read, "generated_tokens": counts.generated}
        return self._seen | tokens | {"requests": requests} | self.facts

    def line(self) -> str | None:
        """For the log, once a minute while anything runs or waits; else None."""
        seen = self._seen
        if not seen or time.monotonic() - self._line_at < _LINE_S:
            return None
        sequences = seen["sequences"]
        if not sequences["running"] + sequences["waiting"]:
            return None
        self._line_at = time.monotonic()
        return (
            f"leankv: {sequences['running']} sequences run, {sequences['waiting']} wait, "
            f"{sequences['stored']} stored; {seen['tokens']:,} tokens, "
            f"KV {seen['bytes'] / 1e6:,.1f} MB of {self.facts.get('limit', 0) / 1e6:,.0f} MB "
            f"(fp16 {seen['fp16_bytes'] / 1e6:,.1f} MB, shared {seen['shared_bytes'] / 1e6:,.1f} "
            f"MB), {seen['hits']} of {seen['hits'] + seen['misses']} prompts began as one before"
        )
