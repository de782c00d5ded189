"""What a benchmark runs, and the form of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from leankv_mlx.benchmarks.shapes import DEFAULT_SHAPE, Heads
from leankv_mlx.benchmarks.timing import Budget, Timings
from leankv_mlx.config import BackendName, CompressionConfig
from leankv_mlx.errors import BackendUnavailableError, UsageError
from leankv_mlx.evaluation.arms import Arm

PARTS = (
    "attention", "steps", "prefill", "encode", "skip", "masks", "policy", "projections",
)  # fmt: skip
Row = dict[str, Any]
"""An entry of a part in the JSON document."""
Advance = Callable[[str], None]
"""Told what is measured next."""

_BUDGET = Budget(seconds=2.0, warm_up=0.3, fewest=3, most=100)


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        only: parts, see PARTS.
        kv: formats of all parts; empty for the usual ones.
        attention, steps, prefill, encode, skip, masks, policy: contexts in tokens of each part.
        projections: models whose products are measured.
        heads: attention layers to measure.
        shape: the model of the other parts; prefill takes the first layers of it.
        dtypes: of the model, each with an arm of ours and one uncompressed.
        more_dtypes: with an uncompressed arm only.
        stock_tokens: longest context of mlx-lm's quantized caches, which take seconds per layer.
        prefill_layers, prefill_dtypes, prefill_rounds, policy_rounds: less of
            that, because it takes minutes.
        budget: per arm, except in prefill.
    """

    only: tuple[str, ...] = PARTS
    kv: tuple[str, ...] = ()
    attention: tuple[int, ...] = (1024, 4096, 16384, 65536)
    steps: tuple[int, ...] = (512, 2048, 4096, 8192, 16384)
    prefill: tuple[int, ...] = (8192,)
    encode: tuple[int, ...] = (512, 4096)
    skip: tuple[int, ...] = (4096, 16384)
    masks: tuple[int, ...] = (4096, 16384)
    policy: tuple[int, ...] = (4096,)
    projections: tuple[str, ...] = ("smollm2-135m", "qwen2.5-0.5b")
    heads: tuple[Heads, ...] = (Heads(32, 8, 128), Heads(4, 1, 128), Heads(4, 1, 256))
    shape: str = DEFAULT_SHAPE
    prefill_layers: int = 1
    prefill_dtypes: tuple[str, ...] = ("bf16", "fp32")
    prefill_rounds: int = 2
    policy_rounds: int = 3
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    more_dtypes: tuple[str, ...] = ("fp16",)
    stock_tokens: int = 16384
    backend: str = "auto"
    budget: Budget = _BUDGET

    def with_tokens(self, tokens: tuple[int, ...]) -> Settings:
        """The same contexts in every part."""
        return replace(
            self,
            attention=tokens,
            steps=tokens,
            prefill=tokens,
            encode=tokens,
            skip=tokens,
            masks=tokens,
            policy=tokens,
        )

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            UsageError: a part is unknown, or there are too few tokens for a compressed body.
        """
        for part in self.only:
            if part not in PARTS:
                raise UsageError(f"--only {part} is unknown; use one of {', '.join(PARTS)}.")
        parts = (
            self.attention, self.steps, self.prefill, self.encode, self.skip, self.masks,
            self.policy,
        )  # fmt: skip
        if min(map(min, parts)) < 128:
            raise UsageError("--tokens is too small; use at least 128.")

    def configs(self, usual: Sequence[str]) -> dict[str, CompressionConfig]:
        """The settings to measure, by the name of their format.

        Raises:
            ConfigError, UsageError, BackendUnavailableError: one is not understood.
        """
        found = {}
        for text in self.kv or usual:
            config = Arm.parse(text).config
            if config is None:
                raise UsageError("--kv none is always measured; give a compressed setting.")
            if self.backend != "auto":
                if self.backend not in get_args(BackendName):
                    raise BackendUnavailableError(
                        f"unknown backend '{self.backend}'; use one of "
                        f"{', '.join(get_args(BackendName))}."
                    )
                config = replace(config, backend=cast(BackendName, self.backend))
            found[replace(config, backend="auto").spec().removeprefix("leankv:")] = config
        return found


FULL = Settings()
FAST = Settings(
    attention=(4096, 16384),
    steps=(512, 16384),
    prefill=(2304,),
    encode=(512,),
    skip=(16384,),
    masks=(4096,),
    heads=(Heads(32, 8, 128), Heads(4, 1, 128)),
    prefill_dtypes=("bf16",),
    prefill_rounds=1,
    policy=(2048,),
    policy_rounds=1,
    projections=("smollm2-135m",),
    more_dtypes=(),
    stock_tokens=1024,
    budget=Budget(seconds=1.0, warm_up=0.1, fewest=2, most=40),
)
"""About two minutes on two idle cores: a look."""


def compared(timings: Timings, name: str, baselines: Sequence[str]) -> Row:
    """The numbers that every row has: medians in ms, the fastest baseline over ours, and per
    baseline the median of its ratios to ours round by round."""
    ms, others = timings.ms(name), {base: timings.ms(base) for base in baselines}
    return {
        "ms": ms,
        "baseline_ms": others,
        "speedup": min(others.values()) / ms,
        "ratios": {base: timings.ratio(base, name) for base in baselines},
    }
