"""Attention that skips values, beside attention that reads all, where a real model attends.

The bundled model reads generated text and decodes a few tokens; what its layers then attend to,
queries and compressed caches, is attended to again with and without `skip`. A context longer than
the text repeats its blocks. The second set of rows is the worst case: the same with queries so
small that all tokens weigh alike, where nothing can be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx

from leankv_mlx.benchmarks.prefill import CHUNK
from leankv_mlx.benchmarks.settings import Advance, Row, Settings, compared
from leankv_mlx.benchmarks.steps import USUAL
from leankv_mlx.benchmarks.timing import interleave
from leankv_mlx.cache import fetch
from leankv_mlx.config import CompressionConfig
from leankv_mlx.evaluation.fidelity import corpus
from leankv_mlx.kernels import Attention, Backend, View
from leankv_mlx.kernels.decode_attention import decode_attention
from leankv_mlx.mlx_lm.attachment import attach, make_caches
from leankv_mlx.mlx_lm.loading import LoadedModel, load
from leankv_mlx.mlx_lm.patches import replaced
from leankv_mlx.mlx_lm.reading import prefill

SKIPS = (0.0001, 0.001, 0.01)
NONE = "no skip"
TEXT_TOKENS = 4096
"""Of the text, at most."""
STEPS = 4
"""Decode steps that are attended to again, the last ones."""

_UNIFORM = 1e-3


@dataclass(frozen=True)
class Call:
    """One layer in one decode step."""

    queries: mx.array
    view: View
    scale: float
    backend: Backend

    def attend(self, skip: float) -> Attention:
        """Its attention."""
        view = replace(self.view, skip=skip)
        return decode_attention(
            self.queries, view, scale=self.scale, mask=None, sink_logits=None,
            backend=self.backend,
        )  # fmt: skip

    def repeated(self, times: int) -> Call:
        """The body so many times over."""
        tiers = [
            replace(
                tier,
                table=mx.concatenate([tier.table] * times, axis=1),
                lengths=tier.lengths * times,
            )
            for tier in self.view.tiers
        ]
        return replace(self, view=replace(self.view, tiers=tiers))


def measure_skip(settings: Settings, advance: Advance) -> list[Row]:
    """A row for each of formats x contexts x data x skips; `ms` is a decode step's attention."""
    loaded = load()
    rows = []
    for name, config in settings.configs(USUAL).items():
        for tokens in settings.skip:
            advance(f"skip, {name}, {tokens} tokens")
            calls = _calls(loaded, config, min(tokens, TEXT_TOKENS))
            calls = [call.repeated(-(-tokens // TEXT_TOKENS)) for call in calls]
            even = [replace(call, queries=call.queries * _UNIFORM) for call in calls]
            for data, some in (("text", calls), ("uniform", even)):
                head = {"shape": loaded.path.name, "tokens": tokens, "data": data, "format": name}
                rows += [head | row for row in _compared(some, settings)]
    return rows


def _calls(loaded: LoadedModel, config: CompressionConfig, tokens: int) -> list[Call]:
    """What the layers attend to in the last of `tokens` tokens of generated text."""
    text = corpus(loaded, None, tokens, 1).chunks[0].tokens[None]
    calls: list[Call] = []

    def record(
        queries: mx.array, view: View, *, scale: float, backend: Backend, **rest: Any
    ) -> Attention:
        calls.append(Call(queries, view, scale, backend))
        return decode_attention(queries, view, scale=scale, backend=backend, **rest)

    with attach(loaded.model, config), replaced(fetch, "decode_attention", record):
        caches = make_caches(loaded.model)
        split = tokens - STEPS
        prompt = cast(list[int], text[0, :split].tolist())
        prefill(loaded.model, prompt, caches, chunk=CHUNK)
        calls.clear()  # a short rest of the prompt
        for at in range(split, tokens):
            mx.eval(loaded.model(text[:, at : at + 1], cache=caches))
    return calls


def _compared(calls: Sequence[Call], settings: Settings) -> list[Row]:
    """One interleaved run of all skips: per step, with the share of the blocks whose values were
    read and the mean relative error of the output."""
    names = {f"{skip:g}": skip for skip in SKIPS}
    arms = {name: _attending(calls, skip) for name, skip in ({NONE: 0.0} | names).items()}
    timings = interleave(arms, settings.budget)
    whole = [call.attend(0.0).out for call in calls]
    rows = []
    for name, skip in names.items():
        found = [call.attend(skip) for call in calls]
        row = compared(timings, name, [NONE])
        row["ms"] /= STEPS
        row["baseline_ms"] = {NONE: row["baseline_ms"][NONE] / STEPS}
        errors = [_error(one.out, all_) for one, all_ in zip(found, whole, strict=True)]
        rows.append({"skip": skip, **row, "read": _read(found), "error": sum(errors) / len(errors)})
    return rows


def _attending(calls: Sequence[Call], skip: float) -> Callable[[], object]:
    return lambda: mx.eval([call.attend(skip).out for call in calls])


def _read(found: Sequence[Attention]) -> float:
    reads = mx.concatenate([one.reads for one in found if one.reads is not None]).sum(0)
    return float(reads[0] / reads[1])


def _error(ours: mx.array, whole: mx.array) -> float:
    ours, whole = ours.astype(mx.float32), whole.astype(mx.float32)
    return float((mx.linalg.norm(ours - whole, axis=-1) / mx.linalg.norm(whole, axis=-1)).mean())
