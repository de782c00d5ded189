"""Many requests at once: mlx-lm's batches with compressed caches beside the same with its own.

Arms differ in the cache only: model, precision and products are the same, and so is the rule of who
is let in. Everything takes turns. Each arm reads every prompt once; all replies then begin from
copies of what was read, with and without a limit of KV bytes. What is not compressed counts two
bytes an element there, whatever the model computes in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator

from leankv_mlx.benchmarks.settings import Advance, Row
from leankv_mlx.benchmarks.shared import measure_shared, turn
from leankv_mlx.benchmarks.suite import machine
from leankv_mlx.benchmarks.timing import Timings
from leankv_mlx.cache import CompressedKVCache, entries
from leankv_mlx.errors import UsageError
from leankv_mlx.evaluation.arms import Arm, parse_arms
from leankv_mlx.evaluation.fidelity import corpus, read_text
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context, load
from leankv_mlx.mlx_lm.usage import measure

_FIRST = 32
"""Tokens of two prompts that are read before anything is timed."""
READ_TOGETHER = 8
"""Prompts at a time, as mlx-lm's server reads them by default."""
Ids = list[int]


@dataclass(frozen=True)
class ServingSettings:
    """What to run.

    Attributes:
        model: folder, hub id or GGUF file; None for the bundled model.
        kv: settings beside the uncompressed cache.
        text: file that prompts are cut from; None for generated text.
        requests, tokens: so many prompts of so many tokens; a shared document has twice as many.
        generate: tokens of each reply.
        question: tokens that follow the shared document, of each request.
        fits: uncompressed sequences that the limit of KV bytes has room for.
        rounds: how often replies are generated.
    """

    model: str | None = None
    kv: tuple[str, ...] = ("leankv",)
    text: Path | None = None
    requests: int = 16
    tokens: int = 2048
    generate: int = 64
    question: int = 32
    fits: int = 4
    rounds: int = 3

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded.

        Raises:
            ConfigError, UsageError: the settings are not understood.
        """
        parse_arms(self.kv)
        if self.tokens < 128:
            raise UsageError("--tokens is too small; use at least 128.")
        for name, least in (
            ("requests", 2), ("generate", 2), ("question", 2), ("fits", 1), ("rounds", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(f"--{name} {getattr(self, name)} is too small.")


FAST = ServingSettings(requests=4, tokens=512, generate=16, fits=2, rounds=1)
"""With the bundled model half a minute on two idle cores: a look."""


@dataclass
class ServingReport:
    """What was measured.

    Attributes:
        batches: a row for each of limits x caches.
        document: a row for each cache, requests on one document.
    """

    model: str
    machine: str
    requests: int
    tokens: int
    generate: int
    batches: list[Row]
    document: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return vars(self)


@dataclass
class _Read:
    """What an arm has read: the prompts' caches without their last tokens, and the seconds that
    each group of prompts took."""

    caches: list[list[Any]] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)


@dataclass
class _Replies:
    """Seconds of each round, and bytes that each sequence of a round reached."""

    seconds: dict[int, float] = field(default_factory=dict)
    reached: list[int] = field(default_factory=list)


def run_serving(settings: ServingSettings, advance: Advance = lambda what: None) -> ServingReport:
    """Measure what the settings ask for.

    Raises:
        UsageError, ConfigError: they are not understood, or the text is too short.
        ModelError: the model cannot be loaded, or no layer of it can be compressed.
    """
    settings.check()
    text = None if settings.text is None else read_text(settings.text)
    advance("loading")
    loaded = load(settings.model)
    check_context(loaded.config, 2 * settings.tokens + settings.question + settings.generate, 0)
    prompts = _cut(loaded, text, settings.tokens, settings.requests)
    (document,) = _cut(loaded, text, 2 * settings.tokens, 1)
    questions = [prompt[1 : 1 + settings.question] for prompt in prompts]  # without a BOS
    arms = parse_arms(settings.kv)
    return ServingReport(
        loaded.path.name,
        machine(),
        settings.requests,
        settings.tokens,
        settings.generate,
        _batches(settings, loaded.model, arms, prompts, advance),
        measure_shared(loaded.model, arms, document, questions, settings.generate, advance),
    )


def _cut(loaded: LoadedModel, text: str | None, tokens: int, count: int) -> list[Ids]:
    chunks = corpus(loaded, text, tokens, count).chunks
    if len(chunks) < count:
        raise UsageError(
            f"the text has room for {len(chunks)} prompts of {tokens} tokens and {count} are "
            "needed; give a longer text, or smaller --requests or --tokens."
        )
    found: list[Any] = [chunk.tokens.tolist() for chunk in chunks]
    return found


def _batches(
    settings: ServingSettings,
    model: nn.Module,
    arms: Sequence[Arm],
    prompts: Sequence[Ids],
    advance: Advance,
) -> list[Row]:
    read = _read_all(model, arms, prompts, advance)
    at_a_time = {arm.kv: len(prompts) for arm in arms}
    free, limited = ({arm.kv: _Replies() for arm in arms} for _ in range(2))
    limit = 0
    for i in range(settings.rounds):
        for name, found in (("no limit", free), ("a limit", limited)):
            for arm in turn(arms, i):
                advance(f"replies, {name}, {arm.kv}")
                fitting = at_a_time[arm.kv] if found is limited else len(prompts)
                caches = read[arm.kv].caches
                with arm.attached(model):
                    took, reached = _reply(model, prompts, caches, settings.generate, fitting)
                found[arm.kv].seconds[i] = took
                found[arm.kv].reached = reached
            if not limit:
                peaks = {kv: _reach(read[kv].caches, one.reached) for kv, one in free.items()}
                limit = settings.fits * peaks[arms[0].kv]
                at_a_time = {
                    kv: min(len(prompts), max(1, limit // peak)) for kv, peak in peaks.items()
                }
    everyone = dict.fromkeys(at_a_time, len(prompts))
    return [
        *_rows(settings, None, everyone, read, free),
        *_rows(settings, limit, at_a_time, read, limited),
    ]


def _read_all(
    model: nn.Module, arms: Sequence[Arm], prompts: Sequence[Ids], advance: Advance
) -> dict[str, _Read]:
    found = {arm.kv: _Read() for arm in arms}
    for i, start in enumerate(range(0, len(prompts), READ_TOGETHER)):
        group = prompts[start : start + READ_TOGETHER]
        for arm in turn(arms, i):
            advance(f"prompts from {start + 1}, {arm.kv}")
            with arm.attached(model):
                if not i:
                    _read(model, [prompt[:_FIRST] for prompt in group[:2]])  # compiles kernels
                caches, found[arm.kv].seconds[i] = _read(model, group)
            found[arm.kv].caches += caches
            mx.clear_cache()
    return found


def _read(model: nn.Module, prompts: Sequence[Ids]) -> tuple[list[list[Any]], float]:
    """The caches of prompts without their last tokens, and the seconds of reading."""
    generator: Any = BatchGenerator(model, prefill_batch_size=READ_TOGETHER)
    uids = generator.insert([list(prompt) for prompt in prompts])
    caches: dict[int, list[Any]] = {}
    took = 0.0
    while len(caches) < len(uids):
        begin = time.perf_counter()
        responses, _ = generator.next()
        took += time.perf_counter() - begin
        done = [one.uid for one in responses if one.end_of_segment and not one.end_of_prompt]
        for uid, (extracted, _) in generator.extract_cache(done).items():
            mx.eval([cache.state for cache in extracted])
            caches[uid] = extracted
        generator.remove(done)
    generator.close()
    return [caches[uid] for uid in uids], took


def _reply(
    model: nn.Module, prompts: Sequence[Ids], read: Sequence[list[Any]], tokens: int, together: int
) -> tuple[float, list[int]]:
    """Seconds of all replies, and the bytes of each sequence at its end."""
    copies = [deepcopy(caches) for caches in read]
    generator: Any = BatchGenerator(
        model, completion_batch_size=together, prefill_batch_size=min(together, READ_TOGETHER)
    )
    begin = time.perf_counter()
    generator.insert(
        [prompt[-1:] for prompt in prompts],
        [tokens] * len(prompts),
        copies,
        [prompt[:-1] for prompt in prompts],
    )
    del copies  # as in a server, only the batch holds them now
    ended: list[list[Any]] = []
    while responses := generator.next_generated():
        ended += [one.prompt_cache for one in responses if one.finish_reason is not None]
    took = time.perf_counter() - begin
    generator.close()
    reached = [_size(caches) for caches in ended]
    mx.clear_cache()
    return took, reached


def _size(caches: Sequence[Any]) -> int:
    """Bytes that count for the limit."""
    return sum(
        measure([cache]).used if isinstance(cache, CompressedKVCache) else measure([cache]).fp16
        for cache in entries(caches)
    )


def _reach(read: Sequence[list[Any]], reached: Sequence[int]) -> int:
    """Bytes that a sequence may take, with its prompt or at its end."""
    return max(*map(_size, read), *reached)


def _rows(
    settings: ServingSettings,
    limit: int | None,
    at_a_time: Mapping[str, int],
    read: Mapping[str, _Read],
    replies: Mapping[str, _Replies],
) -> list[Row]:
    """A row for each arm; speedups are over the first one."""
    reading = Timings({kv: one.seconds for kv, one in read.items()})
    decoding = Timings({kv: one.seconds for kv, one in replies.items()})
    prompted, generated = (settings.requests * n for n in (settings.tokens, settings.generate))
    prompt_s = {kv: sum(one.seconds.values()) for kv, one in read.items()}
    total_s = {kv: prompt_s[kv] + decoding.ms(kv) / 1e3 for kv in replies}
    base = next(iter(replies))
    return [
        {
            "cache": kv,
            "limit_bytes": limit,
            "at_a_time": at_a_time[kv],
            "kv_bytes": sum(sorted(one.reached)[-at_a_time[kv] :]),
            "prefill_tokens_s": prompted / prompt_s[kv],
            "decode_tokens_s": 1e3 * generated / decoding.ms(kv),
            "total_tokens_s": generated / total_s[kv],
            "prefill_speedup": reading.ratio(base, kv),
            "decode_speedup": decoding.ratio(base, kv),
            "total_speedup": total_s[base] / total_s[kv],
            "rounds": len(one.seconds),
        }
        for kv, one in replies.items()
    ]
