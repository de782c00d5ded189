"""Talks to `worker.py`, which another interpreter may run; every failure is one line."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from leankv_mlx.errors import PeerError
from leankv_mlx.evaluation.fidelity import STEP, Chunk
from leankv_mlx.evaluation.metrics import TokenScores
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK

BITS: Mapping[str, float] = {"f16": 16.0, "q8_0": 8.5, "q4_0 hadamard": 4.5}
"""Caches of the peer, and their bits per element: codes and a scale of 16 bits for 32 of them. The
first is the one that it takes by itself, and the base of the others' comparison."""
NAME = "ik_llama.cpp"
ENVIRONMENT = "LEANKV_PEER_PYTHON"

_WORKER = Path(__file__).with_name("worker.py")
# How long a request may take at most: threads that wait for each other actively, as the peer's do,
# are many times slower while the machine does something else.
_START_S = 300.0
_PROMPT_TOKEN_S, _STEP_S = 0.5, 10.0


class Run(NamedTuple):
    """Seconds of a prompt and of the tokens behind it, and the bytes of keys and values then."""

    prefill_s: float
    decode_s: float
    kv_bytes: int


class Peer:
    """ik_llama.cpp with one model file; a context manager that ends its process.

    Args:
        file: a GGUF file.
        threads: how many it computes with.
        python: the interpreter that has ik_llama_cpp; None for this one.
        worker: the script; another one in tests.
        patience: factor of all waiting times.

    Raises:
        PeerError: the package is not there, the file cannot be loaded, or the process ends or
            hangs; also from every method.
    """

    def __init__(
        self,
        file: Path,
        threads: int,
        python: str | None = None,
        worker: Path = _WORKER,
        patience: float = 1.0,
    ) -> None:
        self._patience = patience
        self._python = python or sys.executable
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        try:
            self._process = subprocess.Popen(
                [self._python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log, text=True, encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise PeerError(
                f"cannot start {self._python} for {NAME}: {error.strerror or error}."
            ) from error
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            opened = self._ask(_START_S, do="open", file=str(file.absolute()), threads=threads)
            self.version = str(opened["version"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, cache: str, prompt: list[int], steps: list[int]) -> Run:
        """Read a prompt, and then tokens one by one."""
        reply = self._ask(
            _START_S + _PROMPT_TOKEN_S * len(prompt) + _STEP_S * len(steps),
            do="run", cache=cache, prompt=prompt, steps=steps, chunk=PREFILL_CHUNK,
        )  # fmt: skip
        return Run(**reply)

    def score(self, chunk: Chunk) -> dict[str, TokenScores]:
        """The second half of a chunk with every cache, beside the first cache."""
        reply = self._ask(
            _START_S + _PROMPT_TOKEN_S * chunk.context * len(BITS),
            do="score", caches=list(BITS), tokens=chunk.tokens.tolist(),
            targets=chunk.targets.tolist(), middle=chunk.middle, chunk=PREFILL_CHUNK, step=STEP,
        )  # fmt: skip
        return {
            name: TokenScores(**{key: np.array(values) for key, values in columns.items()})
            for name, columns in reply["scores"].items()
        }

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None  # a pipe was asked for
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        try:
            line = self._replies.get(timeout=seconds * self._patience)
        except queue.Empty:
            self._process.kill()
            raise PeerError(
                f"{NAME} has not answered for {seconds * self._patience:.0f} s and was ended; "
                "use a quiet machine, a smaller --tokens, or no --peer."
            ) from None
        if not line:
            raise self._ended()
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"{NAME} answered {line.strip()[:80]!r}, which is no reply.") from None
        if reply.get("missing"):
            raise PeerError(
                f"{NAME} is not installed for {self._python}: pip install ik-llama-cpp-python, or "
                f"name an interpreter that has it by {ENVIRONMENT}."
            )
        if "error" in reply:
            raise PeerError(f"{NAME} failed: {reply['error']}.")
        return reply

    def _listen(self) -> None:
        """Hand on every line; "" once there will be no more."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def _ended(self) -> PeerError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip().splitlines()
        telling = [line for line in said if "ASSERT" in line or "rror" in line] or said
        detail = f" ({telling[-1].strip()[:200]})" if telling else ""
        return PeerError(f"{NAME} ended {how}{detail}; run without --peer.")
