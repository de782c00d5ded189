"""What the engine's thread does: loading, replying, changing the compression."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.config import CompressionConfig
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.documents.prefix import PREFILL_CHUNK, Opener, prefill
from leankv_mlx.engine.conversation import Conversation
from leankv_mlx.engine.download import progress_class
from leankv_mlx.engine.events import (
    Done,
    Loaded,
    Loading,
    Noted,
    Prefill,
    Recoded,
    Stage,
    Stopped,
    Text,
)
from leankv_mlx.engine.requests import Forget, Load, Read, Recode, Reply, Request
from leankv_mlx.engine.telemetry import Room, bytes_per_token, snapshot
from leankv_mlx.errors import ContextLengthError, ModelError, UsageError
from leankv_mlx.mlx_lm.attachment import Attachment, attach, make_caches
from leankv_mlx.mlx_lm.context import context_length, longest_context
from leankv_mlx.mlx_lm.footprint import spare_memory, weight_bytes
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context, load
from leankv_mlx.mlx_lm.loading import resolve_model as resolve
from leankv_mlx.mlx_lm.usage import measure

if TYPE_CHECKING:
    from leankv_mlx.engine.engine import Engine


@dataclass
class _Run:
    """One reply on its way."""

    prompt: list[int]
    reused: int
    start: float = field(default_factory=time.perf_counter)
    decode_start: float = 0.0
    tokens: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)  # the token that ended it
    text: str = ""
    stage: Stage = "prefill"

    @property
    def speed(self) -> float:
        """Tokens per second, without the prompt."""
        seconds = time.perf_counter() - self.decode_start if self.decode_start else 0.0
        return len(self.tokens) / seconds if seconds > 0 else 0.0


class Worker:
    """Owns the model and the conversation; used by one thread only."""

    def __init__(self, engine: Engine, snapshot_seconds: float) -> None:
        self._engine = engine
        self._snapshot_seconds = snapshot_seconds
        self._next_snapshot = 0.0
        self._loaded: LoadedModel | None = None
        self._attachment: Attachment | None = None
        self._conversation: Conversation | None = None
        self._opener: Opener | None = None
        self._budget = 0
        self._cost = 0.0  # bytes of a further token

    def serve(self, request: Request) -> None:
        """Do what is asked; failures leave as exceptions."""
        match request:
            case Load():
                self._load(request)
            case Reply():
                self._reply(request)
            case Read():
                self._read(request)
            case Recode():
                self._recode(request)
            case Forget():
                if self._conversation is not None:
                    self._conversation.forget()
                    self._snapshot(0, 0.0)

    def close(self) -> None:
        """Give the model back."""
        if self._attachment is not None:
            self._attachment.stop()
        self._loaded = self._attachment = self._conversation = self._opener = None
        mx.clear_cache()

    # Loading

    def _load(self, request: Load) -> None:
        config = _parse(request.kv)
        emit = self._engine.emit
        store = DocumentCache(lambda line: emit(Noted(line)))
        emit(Loading(request.model))
        progress = progress_class(request.model, emit, lambda: self._engine.check(0))
        path = resolve(request.model or None, progress, lambda line: emit(Noted(line)))
        loaded = load(path)
        attachment = attach(loaded.model, config) if config else None
        self.close()  # the old model stays until the new one is there
        self._loaded, self._attachment = loaded, attachment
        if attachment is not None:
            attachment.start()
        self._cost = bytes_per_token(loaded.model)
        self._conversation = Conversation(loaded.model, loaded.tokenizer)
        self._opener = Opener(loaded, config, store)
        weights = weight_bytes(loaded.model)
        self._budget = request.budget or spare_memory(loaded.model)
        mx.reset_peak_memory()
        compressed = attachment.compressed_layers if attachment else 0
        emit(
            Loaded(
                request.model,
                request.model.rstrip("/").rsplit("/", 1)[-1] or "demo model",
                context_length(loaded.config) or 0,
                request.kv,
                self._backend,
                len(self._conversation.caches),
                compressed,
                "" if compressed else self._why_not(),
                weights,
                self._budget,
            )
        )
        self._snapshot(0, 0.0)

    @property
    def _backend(self) -> str:
        if self._attachment is None or not self._attachment.compressed_layers:
            return "none"
        return self._attachment.backend

    def _why_not(self) -> str:
        if self._attachment is None:
            return "the cache is not compressed"
        return "; ".join(dict.fromkeys(row.reason for row in self._attachment.report))

    # Replying

    def _reply(self, request: Reply) -> None:
        loaded, conversation = self._need()
        conversation.check_length(request.turns, longest_context(loaded.config))
        prompt = conversation.prompt(request.turns)
        if not prompt:
            raise UsageError("there is nothing to reply to.")
        limit = self._room(loaded, conversation, prompt, request.max_tokens)
        run = _Run(prompt, conversation.reuse(prompt))
        reason: Any = "length"
        try:
            self._engine.check(request.request)
            reason = self._generate(request, loaded, conversation, run, limit)
        except _stop_type():
            self._engine.emit(Stopped(request.request, run.stage, len(run.tokens)))
        else:
            now = time.perf_counter()
            self._engine.emit(
                Done(
                    request.request,
                    reason,
                    len(prompt),
                    run.reused,
                    len(run.tokens),
                    (run.decode_start or now) - run.start,
                    now - run.decode_start if run.decode_start else 0.0,
                )
            )
        finally:
            conversation.settle(prompt, [*run.tokens, *run.end])
            conversation.remember(prompt, request.turns, run.text, run.tokens)
        self._snapshot(request.request, run.speed)

    def _read(self, request: Read) -> None:
        loaded, conversation = self._need()
        conversation.check_length(request.turns, longest_context(loaded.config))
        prompt = conversation.beginning(request.turns)
        self._room(loaded, conversation, prompt, 1)
        run = _Run(prompt, conversation.reuse([*prompt, -1]))
        self._find(request, conversation, run)
        emit = self._engine.emit

        def progress(done: int, total: int) -> None:
            emit(Prefill(request.request, done, total, run.reused))
            self._engine.check(request.request)
            self._snapshot_now_and_then(request.request, 0.0)

        try:
            prefill(loaded.model, prompt[run.reused :], conversation.caches, progress)
            if request.name and not run.reused and self._opener is not None:
                self._opener.keep(prompt, request.name, conversation.caches)
        except _stop_type():
            emit(Stopped(request.request, "prefill", 0))
        else:
            seconds = time.perf_counter() - run.start
            emit(Done(request.request, "stop", len(prompt), run.reused, 0, seconds, 0.0))
        finally:
            conversation.settle(prompt, [])
        self._snapshot(request.request, 0.0)

    def _find(self, request: Read, conversation: Conversation, run: _Run) -> None:
        """Open a document that was read before, unless the conversation has it already."""
        if not request.name or run.reused == len(run.prompt) or self._opener is None:
            return
        found = self._opener.find(run.prompt, request.name)
        if found is not None:
            conversation.caches, conversation.tokens = found, list(run.prompt)
            run.reused = len(run.prompt)

    def _generate(
        self,
        request: Reply,
        loaded: LoadedModel,
        conversation: Conversation,
        run: _Run,
        limit: int,
    ) -> str:
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        def progress(done: int, total: int) -> None:
            if not run.tokens:
                emit(Prefill(request.request, done, total, run.reused))
            self._engine.check(request.request)
            self._snapshot_now_and_then(request.request, 0.0)

        emit = self._engine.emit
        steps = stream_generate(
            loaded.model,
            loaded.tokenizer,
            mx.array(run.prompt[run.reused :]),
            max_tokens=limit,
            sampler=make_sampler(request.temperature, request.top_p),
            prompt_cache=conversation.caches,
            prefill_step_size=PREFILL_CHUNK,
            prompt_progress_callback=progress,
        )
        try:
            for step in steps:
                if run.stage == "prefill":
                    run.stage, run.decode_start = "decode", time.perf_counter()
                (run.end if step.finish_reason == "stop" else run.tokens).append(step.token)
                if step.text:
                    run.text += step.text
                    emit(Text(request.request, step.text, len(run.tokens)))
                if step.finish_reason:
                    return str(step.finish_reason)
                self._snapshot_now_and_then(request.request, run.speed)
                self._engine.check(request.request)
        finally:
            steps.close()
        return "length"

    def _need(self) -> tuple[LoadedModel, Conversation]:
        if self._loaded is None or self._conversation is None:
            raise ModelError("no model is loaded; choose one.")
        return self._loaded, self._conversation

    def _room(
        self, loaded: LoadedModel, conversation: Conversation, prompt: list[int], limit: int
    ) -> int:
        """How long the reply may be.

        Raises:
            ContextLengthError: the prompt does not fit the model or the memory budget.
        """
        limit = check_context(loaded.config, len(prompt), limit)
        held = measure(conversation.caches)
        after = held.used + self._cost * max(0, len(prompt) - held.tokens)
        if after > self._budget:
            raise ContextLengthError(
                f"the conversation needs {after / 1e6:.1f} MB of KV cache and the budget is "
                f"{self._budget / 1e6:.1f} MB; compact it, or begin a new one."
            )
        return min(limit, 1 + int((self._budget - after) / self._cost)) if self._cost else limit

    # The compression of the session

    def _recode(self, request: Recode) -> None:
        config = _parse(request.kv)
        loaded, conversation = self._need()
        before = measure(conversation.caches).used
        attachment = attach(loaded.model, config) if config else None
        if self._attachment is not None:
            self._attachment.stop()
        self._attachment = attachment
        if attachment is not None:
            attachment.start()
        if self._opener is not None:
            self._opener = replace(self._opener, config=config)
        old, tokens = conversation.caches, conversation.tokens
        self._cost = bytes_per_token(loaded.model)
        reread = not all(map(_can_become, old, [config] * len(old)))
        conversation.forget_cache()
        if not reread:
            conversation.caches = [
                _recoded(cache, fresh)
                for cache, fresh in zip(old, make_caches(loaded.model), strict=True)
            ]
            conversation.tokens = tokens
        mx.clear_cache()
        self._engine.emit(
            Recoded(
                request.kv,
                self._backend,
                attachment.compressed_layers if attachment else 0,
                reread and bool(tokens),
                before,
                measure(conversation.caches).used,
            )
        )
        self._snapshot(0, 0.0)

    # Telemetry

    def _snapshot(self, request: int, speed: float) -> None:
        loaded, conversation = self._need()
        self._next_snapshot = time.perf_counter() + self._snapshot_seconds
        context = context_length(loaded.config) or 0
        room = Room(self._budget, self._cost, context)
        self._engine.emit(snapshot(request, conversation.caches, room, speed))

    def _snapshot_now_and_then(self, request: int, speed: float) -> None:
        if time.perf_counter() >= self._next_snapshot:
            self._snapshot(request, speed)


def _parse(kv: str) -> CompressionConfig | None:
    return None if kv == "none" else CompressionConfig.parse(kv, stored=True)  # read before


def _stop_type() -> type[Exception]:
    from leankv_mlx.engine.engine import Cancelled

    return Cancelled


def _can_become(cache: Any, config: CompressionConfig | None) -> bool:
    """Whether nothing is gained by reading the tokens again."""
    if not isinstance(cache, CompressedKVCache) or cache.empty():
        return True
    if config is None or (cache.layer and cache.layer.ragged):
        return False
    pairs: list[tuple[Any, Any]] = [
        (config.k_bits, cache.config.k_bits),
        (config.v_bits, cache.config.v_bits),
    ]
    return all(_top(new) <= _top(old) for new, old in pairs)


def _top(bits: int | tuple[int, ...]) -> int:
    return bits if isinstance(bits, int) else max(bits)


def _recoded(old: Any, fresh: Any) -> Any:
    """The tokens of one cache in another of the kind that the model now makes."""
    if isinstance(old, CompressedKVCache):
        if old.empty():
            return fresh
        keys, values = old.keys_and_values()
    elif isinstance(fresh, CompressedKVCache) and old.keys is not None:
        keys, values = old.keys[..., : old.offset, :], old.values[..., : old.offset, :]
    else:
        return old
    fresh.update_and_fetch(keys, values)
    mx.eval(fresh.state)
    return fresh
