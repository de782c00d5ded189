"""A real model on a real text: prefill, decode, bytes and fidelity, beside ik_llama.cpp.

Ours and the peer's caches take turns on the same tokens, never at the same time, each in chunks of
512 tokens: a prompt is read up to the logits of its last token, and then tokens of the text one by
one. Fidelity is each program's own: its caches beside its uncompressed one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from leankv_mlx.benchmarks.peer.client import BITS, NAME, Peer, Run
from leankv_mlx.benchmarks.settings import Advance, Row
from leankv_mlx.benchmarks.suite import machine
from leankv_mlx.benchmarks.timing import Timings
from leankv_mlx.errors import BackendUnavailableError, UsageError
from leankv_mlx.evaluation.arms import Arm, Size, parse_arms, settle
from leankv_mlx.evaluation.fidelity import Corpus, corpus, read_text, run_fidelity
from leankv_mlx.evaluation.metrics import Fidelity, TokenScores, summarize
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.context import context_length
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context, load
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.mlx_lm.usage import measure

OURS = "leankv"
STEPS = 32
"""Tokens that are decoded behind a prompt: as many as there are between two flushes."""
_WARM_UP = 64  # tokens of a prompt that loads weights and compiles kernels
_REST_S = 0.1  # until the other program's threads have stopped waiting for work
_LONG_S = 300.0  # an arm that takes longer is not run again


@dataclass(frozen=True)
class RealSettings:
    """What to run.

    Attributes:
        model: folder, hub id or GGUF file; None for the peer's file, or else the bundled model.
        peer: GGUF file that ik_llama.cpp runs; None for no peer.
        peer_python: the interpreter that has it; None for this one.
        kv: settings beside the uncompressed cache.
        text: file whose text is read; None for generated text.
        tokens: contexts of prefill and decode; one that the model has no room for is cut.
        rounds: how often everything takes its turn.
        context, chunks: fidelity on so many chunks of so many tokens.
    """

    model: str | None = None
    peer: Path | None = None
    peer_python: str | None = None
    kv: tuple[str, ...] = ("leankv",)
    text: Path | None = None
    tokens: tuple[int, ...] = (512, 4096, 8192)
    rounds: int = 3
    context: int = 1024
    chunks: int = 4

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded.

        Raises:
            ConfigError, UsageError: the settings are not understood.
        """
        parse_arms(self.kv)
        if min(self.tokens) < 128:
            raise UsageError("--tokens is too small; use at least 128.")
        for name in ("rounds", "chunks"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} is too small.")
        if self.peer is not None and not self.peer.is_file():
            raise UsageError(f"--peer {self.peer}: there is no such file; give a GGUF file.")


@dataclass
class RealReport:
    """What was measured.

    Attributes:
        peer: its name and version; None without.
        threads: how many both compute with.
        speed: a row for each of contexts x caches.
        fidelity: a row for each cache.
    """

    model: str
    machine: str
    peer: str | None
    threads: int
    speed: list[Row]
    fidelity: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return vars(self)


class _Cache(NamedTuple):
    program: str
    name: str


Runner = Callable[[list[int], list[int]], Run]
"""Reads a prompt and then tokens one by one."""


def run_real(settings: RealSettings, advance: Advance = lambda what: None) -> RealReport:
    """Measure what the settings ask for.

    Raises:
        UsageError, ConfigError: they are not understood, or the text is too short.
        ModelError: the model cannot be loaded, or no layer of it can be compressed.
        PeerError: ik_llama.cpp is not there, failed, or hangs.
    """
    settings.check()
    threads = _threads()
    text = None if settings.text is None else read_text(settings.text)
    advance("loading")
    opened = (
        nullcontext()
        if settings.peer is None
        else Peer(settings.peer, threads, settings.peer_python)
    )
    with opened as peer:
        loaded = load(settings.model or settings.peer)
        check_context(loaded.config, settings.context - 1, 1)
        return RealReport(
            model=loaded.path.name,
            machine=machine(),
            peer=f"{NAME} {peer.version}" if peer else None,
            threads=threads,
            speed=_speed(settings, loaded, text, peer, advance),
            fidelity=_fidelity(settings, loaded, text, peer, advance),
        )


def _threads() -> int:
    """How many our kernels use."""
    from leankv_mlx.kernels import cpu

    try:
        return int(cpu.load().threads())
    except BackendUnavailableError:
        return os.cpu_count() or 1


def _speed(
    settings: RealSettings,
    loaded: LoadedModel,
    text: str | None,
    peer: Peer | None,
    advance: Advance,
) -> list[Row]:
    ours: dict[_Cache, Runner] = {
        _Cache(OURS, arm.kv): _ours(loaded, arm) for arm in parse_arms(settings.kv)
    }
    theirs: dict[_Cache, Runner] = (
        {_Cache(NAME, cache): _theirs(peer, cache) for cache in BITS} if peer else {}
    )
    order = [name for pair in zip_longest(ours, theirs) for name in pair if name]
    runners = {name: (ours | theirs)[name] for name in order}
    limit = context_length(loaded.config)
    room = max(settings.tokens) if limit is None else limit - STEPS
    rows = []
    for tokens in dict.fromkeys(min(n, room) for n in settings.tokens):
        (chunk,) = corpus(loaded, text, tokens + STEPS, 1).chunks
        ids = [int(token) for token in np.array(chunk.tokens)]
        for runner in runners.values():
            runner(ids[:_WARM_UP], ids[:2])

        def tell(name: _Cache, n: int = tokens) -> None:
            advance(f"{n} tokens, {_label(name)}")

        runs = _rounds(runners, ids[:tokens], ids[tokens:], settings.rounds, tell)
        rows += _speed_rows(tokens, runs)
    return rows


def _rounds(
    runners: Mapping[_Cache, Runner],
    prompt: list[int],
    steps: list[int],
    rounds: int,
    tell: Callable[[_Cache], None],
) -> dict[_Cache, dict[int, Run]]:
    """Everything in turn, round after round; who begins changes."""
    names = list(runners)
    runs: dict[_Cache, dict[int, Run]] = {name: {} for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            if any(sum(run[:2]) > _LONG_S for run in runs[name].values()):
                continue
            tell(name)
            time.sleep(_REST_S)
            runs[name][i] = runners[name](prompt, steps)
    return runs


def _speed_rows(tokens: int, runs: Mapping[_Cache, Mapping[int, Run]]) -> list[Row]:
    """Rates are medians, and so are their ratios to the reference: the peer's own cache, or else
    our uncompressed one."""
    reading, decode = (
        Timings({_label(c): {i: run[side] for i, run in of.items()} for c, of in runs.items()})
        for side in range(2)
    )
    reference = _label(next((cache for cache in runs if cache.program == NAME), next(iter(runs))))
    return [
        {
            "tokens": tokens,
            "program": cache.program,
            "cache": cache.name,
            "prefill_tokens_s": 1e3 * tokens / reading.ms(_label(cache)),
            "decode_tokens_s": 1e3 * STEPS / decode.ms(_label(cache)),
            "kv_bytes": next(iter(of.values())).kv_bytes,
            "rounds": len(of),
            "reference": reference,
            "prefill_speedup": reading.ratio(reference, _label(cache)),
            "decode_speedup": decode.ratio(reference, _label(cache)),
        }
        for cache, of in runs.items()
    ]


def _label(cache: _Cache) -> str:
    return " ".join(cache)


def _ours(loaded: LoadedModel, arm: Arm) -> Runner:
    def run(prompt: list[int], steps: list[int]) -> Run:
        model = loaded.model
        with arm.attached(model):
            caches = make_caches(model)
            begin = time.perf_counter()
            prefill(model, prompt[:-1], caches)  # as mlx-lm does: the last token is a step
            settle(model, caches, prompt[:-1])
            mx.eval(model(mx.array([prompt[-1:]]), cache=caches))
            read = time.perf_counter()
            _decode(model, steps, caches)
            end = time.perf_counter()
            found = Run(read - begin, end - read, measure(caches).used)
        mx.clear_cache()
        return found

    return run


def _decode(model: nn.Module, steps: list[int], caches: list[Any]) -> None:
    """As mlx-lm generates: while a step is evaluated the graph of the next one is built."""
    running: mx.array | None = None
    for token in steps:
        logits = model(mx.array([[token]]), cache=caches)
        mx.async_eval(logits)
        if running is not None:
            mx.eval(running)
        running = logits
    mx.eval(running)


def _theirs(peer: Peer, cache: str) -> Runner:
    return lambda prompt, steps: peer.run(cache, prompt, steps)


def _fidelity(
    settings: RealSettings,
    loaded: LoadedModel,
    text: str | None,
    peer: Peer | None,
    advance: Advance,
) -> list[Row]:
    texts = corpus(loaded, text, settings.context, settings.chunks)
    arms = parse_arms(settings.kv)
    sizes: dict[str, Size] = {}
    found = run_fidelity(loaded, arms, texts, lambda what, tokens: advance(what), sizes=sizes)
    rows = [
        _fidelity_row(OURS, arm.kv, sizes[arm.kv].body_bits or 16.0, found[arm.kv]) for arm in arms
    ]
    if peer:
        theirs = _peer_fidelity(peer, texts, advance)
        rows += [_fidelity_row(NAME, cache, BITS[cache], theirs[cache]) for cache in BITS]
    return rows


def _peer_fidelity(peer: Peer, texts: Corpus, advance: Advance) -> dict[str, Fidelity]:
    parts: dict[str, list[TokenScores]] = {cache: [] for cache in BITS}
    for chunk in texts.chunks:
        advance(f"fidelity {NAME}")
        for cache, scores in peer.score(chunk).items():
            parts[cache].append(scores)
    return {cache: summarize(scores, texts.scored_bytes) for cache, scores in parts.items()}


def _fidelity_row(program: str, cache: str, bits: float, found: Fidelity) -> Row:
    return {"program": program, "cache": cache, "body_bits": bits, **found.as_dict()}
