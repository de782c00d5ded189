"""Runs ik_llama.cpp: requests come as JSON lines on stdin, each is answered by one on stdout.

A script for the interpreter that has ik_llama_cpp, which need not be the one that has leankv_mlx:
nothing of the package is imported here. Requests, with tokens as lists of ids:

    {"do": "open", "file": F, "threads": N}             -> {"version": V}
    {"do": "run", "cache": C, "prompt": T, "steps": T, "chunk": N}
                                                        -> {"prefill_s", "decode_s", "kv_bytes"}
    {"do": "score", "caches": [C..], "tokens": T, "targets": T, "middle": N, "chunk": N, "step": N}
                                                        -> {"scores": {C: {"kl": [..], ..}}}

A request that fails is answered by {"error": one line}; where the package is not there at all,
"missing" is true beside it. A cache C is a name of CACHES. `score` reads tokens before the middle
in chunks and the others in calls of `step`, with every cache side by side, and compares each with
the first one, token by token.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

# ggml's numbers of the types, and whether keys and values get a Hadamard transform first.
CACHES: dict[str, tuple[int, bool]] = {
    "f16": (1, False),
    "q8_0": (8, False),
    "q4_0 hadamard": (2, True),
}


class Program:
    """One model file in memory."""

    def __init__(self, file: str, threads: int) -> None:
        import ik_llama_cpp
        from ik_llama_cpp import _ctypes_api

        self.version: str = ik_llama_cpp.__version__
        self.api: Any = _ctypes_api
        self.threads = threads
        self.api.llama_backend_init()
        parameters = self.api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"cannot load {file}")
        self.words: int = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))


class Context:
    """A sequence with a cache of some kind. Every call reads at most `chunk` tokens."""

    def __init__(self, program: Program, cache: str, size: int, chunk: int) -> None:
        self._api, self._words, self._position = program.api, program.words, 0
        kind, hadamard = CACHES[cache]
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = size
        parameters.n_batch = parameters.n_ubatch = chunk
        parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = program.threads
        parameters.type_k = parameters.type_v = kind
        parameters.k_cache_hadamard = parameters.v_cache_hadamard = hadamard
        parameters.flash_attn = True  # quantized values need it
        self._handle = self._api.llama_init_from_model(program.model, parameters)
        if not self._handle:
            raise RuntimeError(f"no context of {size} tokens with a cache of {cache}")
        self._chunk = chunk
        self._batch = self._api.llama_batch_init(chunk, 0, 1)

    def read(self, tokens: list[int]) -> None:
        """Read tokens in chunks; the logits of the last one are computed."""
        for start in range(0, len(tokens), self._chunk):
            end = start + self._chunk
            self._call(tokens[start:end], all_logits=False, last=end >= len(tokens))
        self._logits(-1)  # waits

    def scored(self, tokens: list[int]) -> Any:
        """Read tokens in one call: logits [N, V]."""
        import numpy as np

        self._call(tokens, all_logits=True, last=True)
        rows = np.ctypeslib.as_array(self._logits(0), (len(tokens), self._words))
        return rows.astype(np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens so far, as the library counts them."""
        size = self._api._lib.llama_state_seq_get_size
        size.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32]
        size.restype = ctypes.c_size_t
        return int(size(self._handle, 0, 0))

    def close(self) -> None:
        """Give the memory back."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._handle)

    def _call(self, tokens: list[int], all_logits: bool, last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or (last and i == len(tokens) - 1)
        if code := self._api.llama_decode(self._handle, batch):
            raise RuntimeError(f"llama_decode returned {code} at token {self._position}")
        self._position += len(tokens)

    def _logits(self, i: int) -> Any:
        found = self._api.llama_get_logits_ith(self._handle, i)
        if not found:
            raise RuntimeError("there are no logits")
        return found


def run(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt and then tokens one by one, timed."""
    prompt, steps = request["prompt"], request["steps"]
    context = Context(program, request["cache"], len(prompt) + len(steps), request["chunk"])
    try:
        begin = time.perf_counter()
        context.read(prompt)
        read = time.perf_counter()
        for token in steps:
            context.read([token])
        done = time.perf_counter()
        return {"prefill_s": read - begin, "decode_s": done - read, "kv_bytes": context.nbytes}
    finally:
        context.close()


def score(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    """Compare the caches with the first of them."""
    tokens, targets, middle = request["tokens"], request["targets"], request["middle"]
    names: list[str] = request["caches"]
    found: dict[str, dict[str, list[float]]] = {
        name: {"kl": [], "same": [], "nll_base": [], "nll": []} for name in names
    }
    contexts: list[Context] = []
    try:
        for name in names:
            contexts.append(Context(program, name, len(tokens), request["chunk"]))
            contexts[-1].read(tokens[:middle])
        for start in range(middle, len(tokens), request["step"]):
            end = min(start + request["step"], len(tokens))
            base: Any = None
            for name, context in zip(names, contexts):  # noqa: B905 - as long as each other
                rows = _log_probabilities(context.scored(tokens[start:end]))
                base = rows if base is None else base
                for column, values in _compared(base, rows, targets[start:end]).items():
                    found[name][column] += values.tolist()
    finally:
        for context in contexts:
            context.close()
    return {"scores": found}


def _log_probabilities(logits: Any) -> Any:
    import numpy as np

    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _compared(base: Any, other: Any, targets: list[int]) -> dict[str, Any]:
    """Log-probabilities [N, V] of two caches: the numbers of each token."""
    import numpy as np

    at = np.arange(len(targets)), np.array(targets)
    return {
        "kl": (np.exp(base) * (base - other)).sum(axis=-1),
        "same": (base.argmax(axis=-1) == other.argmax(axis=-1)).astype(np.float64),
        "nll_base": -base[at],
        "nll": -other[at],
    }


def main() -> None:
    """Answer until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the library may print; replies are alone on what was stdout
    program: Program | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "open":
                program = Program(request["file"], request["threads"])
                reply: dict[str, Any] = {"version": program.version}
            elif program is None:
                raise RuntimeError("no model is open")
            else:
                reply = (run if request["do"] == "run" else score)(program, request)
        except ImportError as error:
            reply = {"error": str(error), "missing": True}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
