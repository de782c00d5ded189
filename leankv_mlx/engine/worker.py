"""What the engine's thread does: loading, replying, changing the compression."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from leankv_mlx.config import parse_kv
from leankv_mlx.documents.cache import DocumentCache
from leankv_mlx.engine.compaction import first_part, folded
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
from leankv_mlx.engine.requests import (
    Cancelled,
    Control,
    Forget,
    Load,
    Read,
    Recode,
    Reply,
    Request,
    Turn,
)
from leankv_mlx.engine.session import Session
from leankv_mlx.engine.telemetry import snapshot
from leankv_mlx.errors import ModelError, UsageError
from leankv_mlx.mlx_lm.footprint import weight_bytes
from leankv_mlx.mlx_lm.loading import LoadedModel, load
from leankv_mlx.mlx_lm.loading import resolve_model as resolve
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.mlx_lm.usage import Usage, measure

_SUMMARY_TOKENS = 256
"""The longest summary of a part of a conversation."""


@dataclass
class _Run:
    """One reply on its way."""

    prompt: list[int] = field(default_factory=list)
    reused: int = 0
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
    """Owns the model and the conversation; used by one thread only.

    Args:
        control: is told every event, and says when to stop.
        snapshot_seconds: time between two snapshots of the cache during a reply.
    """

    def __init__(self, control: Control, snapshot_seconds: float) -> None:
        self._control = control
        self._snapshot_seconds = snapshot_seconds
        self._next_snapshot = 0.0
        self._session: Session | None = None

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
                if self._session is not None:
                    self._session.conversation.forget()
                    self._snapshot(0, 0.0)

    def close(self) -> None:
        """Give the model back."""
        if self._session is not None:
            self._session.close()
        self._session = None
        mx.clear_cache()

    def _need(self) -> Session:
        if self._session is None:
            raise ModelError("no model is loaded; choose one.")
        return self._session

    # Loading

    def _load(self, request: Load) -> None:
        config = parse_kv(request.kv, stored=True)  # whoever asks has read it before
        emit = self._control.emit
        store = DocumentCache(lambda line: emit(Noted(line)))
        emit(Loading(request.model))
        loaded = self._fetched(request.model)
        session = Session.begin(request.model, loaded, config, request.budget, store)
        self.close()  # the old model stays until the new one is there
        self._session = session
        mx.reset_peak_memory()
        emit(
            Loaded(
                request.model,
                request.model.rstrip("/").rsplit("/", 1)[-1] or "demo model",
                session.room.context,
                request.kv,
                session.backend,
                len(session.conversation.caches),
                session.compressed,
                session.why_not,
                weight_bytes(loaded.model),
                session.room.budget,
            )
        )
        self._snapshot(0, 0.0)

    def _fetched(self, model: str) -> LoadedModel:
        """A model in memory; what takes long before, a download or a conversion, can be stopped."""
        emit = self._control.emit

        def look() -> None:
            self._control.check(0)

        progress = progress_class(model, emit, look)
        try:
            path = resolve(model or None, progress, lambda line: emit(Noted(line)), look)
        finally:
            look()  # the hub's client has an error of its own for what is raised in a download
        return load(path)

    # Replying

    def _reply(self, request: Reply) -> None:
        session = self._need()
        if request.model not in (None, session.model):
            raise ModelError(
                f"the question was for {request.model or 'the demo model'}, which is not loaded; "
                "ask again (Ctrl+R) to have it answered by the model that is."
            )
        run = _Run()
        reason: Any = "length"
        try:
            self._control.check(request.request)
            turns = self._that_fit(request) if request.summary else request.turns
            limit = self._open(run, turns, request.max_tokens)
            reason = self._generate(request, run, turns, limit)
        except Cancelled:
            self._control.emit(Stopped(request.request, run.stage, len(run.tokens)))
        else:
            now = time.perf_counter()
            self._control.emit(
                Done(
                    request.request,
                    reason,
                    len(run.prompt),
                    run.reused,
                    len(run.tokens),
                    (run.decode_start or now) - run.start,
                    now - run.decode_start if run.decode_start else 0.0,
                )
            )
        self._snapshot(request.request, run.speed)

    def _that_fit(self, request: Reply) -> tuple[Turn, ...]:
        """The conversation to summarize; what does not fit of it is summarized by parts first."""
        session = self._need()
        conversation, room = session.conversation, session.room
        alone = room.longest(Usage())
        summary = min(request.max_tokens, _SUMMARY_TOKENS, alone // 4)

        def tokens(turns: Sequence[Turn]) -> int:
            self._control.check(request.request)
            return len(conversation.prompt(turns))

        turns, shorter = request.turns, True
        while shorter:
            prompt = conversation.prompt(turns)
            conversation.reuse(prompt)
            if len(prompt) + summary <= room.longest(measure(conversation.caches)):
                break
            part = first_part(turns, lambda some: tokens(some) + summary <= alone)
            if part is None:
                break  # the budget is too small for anything, which is said when it is read
            asked, rest = part
            run = _Run()
            limit = self._open(run, asked, summary)
            self._generate(request, run, asked, limit, quiet=True)
            turns = folded(turns, run.text, rest)
            shorter = tokens(turns) < len(prompt)
        return turns

    def _read(self, request: Read) -> None:
        session = self._need()
        conversation = session.conversation
        session.check_length(request.turns)
        prompt = conversation.beginning(request.turns)
        run = _Run(prompt, conversation.reuse([*prompt, -1]))
        session.limit(prompt, 1)
        self._find(request, run)
        emit, progress = self._control.emit, self._progress(request.request, run)

        def look() -> None:
            self._control.check(request.request)

        try:
            rest, caches = prompt[run.reused :], conversation.caches
            prefill(session.loaded.model, rest, caches, progress, session.pace)
            if request.name and not run.reused:
                session.opener.keep(prompt, request.name, caches, session.pace, look)
        except Cancelled:
            emit(Stopped(request.request, "prefill", 0))
        else:
            seconds = time.perf_counter() - run.start
            emit(Done(request.request, "stop", len(prompt), run.reused, 0, seconds, 0.0))
        finally:
            conversation.settle(prompt, [])
        self._snapshot(request.request, 0.0)

    def _find(self, request: Read, run: _Run) -> None:
        """Open a document that was read before, unless the conversation has it already."""
        session = self._need()
        if not request.name or run.reused == len(run.prompt):
            return
        found = session.opener.find(run.prompt, request.name)
        if found is not None:
            session.conversation.caches = found
            session.conversation.tokens = list(run.prompt)
            run.reused = len(run.prompt)

    def _open(self, run: _Run, turns: Sequence[Turn], max_tokens: int) -> int:
        """Begin a run: what of its prompt is in the caches; returns how long the reply may be.

        Raises:
            ContextLengthError: the prompt does not fit the model or the memory budget.
        """
        session = self._need()
        session.check_length(turns)
        run.prompt = session.conversation.prompt(turns)
        if not run.prompt:
            raise UsageError("there is nothing to reply to.")
        run.reused = session.conversation.reuse(run.prompt)
        return session.limit(run.prompt, max_tokens)

    def _generate(
        self, request: Reply, run: _Run, turns: Sequence[Turn], limit: int, quiet: bool = False
    ) -> str:
        """Read what is not in the caches, and reply; `quiet` tells only how far it is read."""
        from mlx_lm import stream_generate
        from mlx_lm.generate import wired_limit
        from mlx_lm.sample_utils import make_sampler

        session, emit = self._need(), self._control.emit
        model, conversation = session.loaded.model, session.conversation
        rest = run.prompt[run.reused :]
        progress = self._progress(request.request, run, len(rest))
        steps = stream_generate(
            model,
            session.loaded.tokenizer,
            mx.array(rest[-1:]),
            max_tokens=limit,
            sampler=make_sampler(request.temperature, request.top_p),
            prompt_cache=conversation.caches,
        )
        try:
            # Not by mlx-lm, which looks up after a fixed number of tokens.
            with wired_limit(model):
                prefill(model, rest[:-1], conversation.caches, progress, session.pace)
            for step in steps:
                if run.stage == "prefill":
                    progress(len(rest), len(rest))
                    run.stage, run.decode_start = "decode", time.perf_counter()
                (run.end if step.finish_reason == "stop" else run.tokens).append(step.token)
                run.text += step.text
                if step.text and not quiet:
                    emit(Text(request.request, step.text, len(run.tokens)))
                if step.finish_reason:
                    return str(step.finish_reason)
                self._snapshot_now_and_then(request.request, run.speed)
                self._control.check(request.request)
        finally:
            steps.close()
            conversation.settle(run.prompt, [*run.tokens, *run.end])
            conversation.remember(run.prompt, turns, run.text, run.tokens)
        return "length"

    def _progress(self, number: int, run: _Run, total: int = 0) -> Callable[[int, int], None]:
        """Tells how far a prompt is read, of `total` tokens, and looks whether to go on."""

        def progress(done: int, tokens: int) -> None:
            self._control.emit(Prefill(number, done, total or tokens, run.reused))
            self._control.check(number)
            self._snapshot_now_and_then(number, 0.0)

        return progress

    # The compression of the session

    def _recode(self, request: Recode) -> None:
        config = parse_kv(request.kv, stored=True)
        session = self._need()
        before = measure(session.conversation.caches).used
        kept = session.recode(config)
        self._control.emit(
            Recoded(
                request.kv,
                session.backend,
                session.compressed,
                not kept,
                before,
                measure(session.conversation.caches).used,
            )
        )
        self._snapshot(0, 0.0)

    # Telemetry

    def _snapshot(self, request: int, speed: float) -> None:
        session = self._need()
        self._next_snapshot = time.perf_counter() + self._snapshot_seconds
        caches, room = session.conversation.caches, session.room
        self._control.emit(snapshot(request, caches, room, speed, session.weights_read))

    def _snapshot_now_and_then(self, request: int, speed: float) -> None:
        if time.perf_counter() >= self._next_snapshot:
            self._snapshot(request, speed)
