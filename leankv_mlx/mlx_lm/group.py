"""The machines that hold one model: MLX's group of processes, as `mlx.launch` starts them.

mlx-lm splits a model by its heads, and each machine then has its own KV heads of every layer, or by
its layers (`--pipeline`). What a cache sees is a smaller model, so nothing of a cache is sent:
settings are the same everywhere, and policies decide on each machine for what it holds.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar, cast

import mlx.core as mx
from mlx import nn

Counted = TypeVar("Counted")

_GROUPS = "group", "sharding_group"
"""What MLX's layers and mlx-lm's call the machines that have the other heads."""


def machines_of(model: nn.Module) -> int:
    """How many machines a model is split over; 1 for one that is whole."""
    return max(map(_machines, model.modules()), default=1)


def _machines(module: Any) -> int:
    groups = (getattr(module, name, None) for name in _GROUPS)
    by_heads = [group.size() for group in groups if isinstance(group, mx.distributed.Group)]
    return max(by_heads, default=_stages(module))


def stages_of(model: nn.Module) -> int:
    """How many machines share the layers of a model; 1 if each machine has some of all."""
    return max(map(_stages, model.modules()), default=1)


def _stages(module: Any) -> int:
    return int(getattr(module, "pipeline_size", 1))


def is_first() -> bool:
    """Whether this is the machine that speaks for all."""
    return bool(mx.distributed.init().rank() == 0)


def place(model: nn.Module, layers: int) -> tuple[int, int]:
    """Where the layers of this machine stand among those of all.

    Every machine of a pipeline has to ask at the same point of its work.

    Args:
        layers: how many this machine has.

    Returns:
        How many there are before them, and how many on all machines.
    """
    if stages_of(model) == 1:
        return 0, layers
    counts: Any = mx.distributed.all_gather(mx.array([layers]), stream=mx.cpu).tolist()
    later = mx.distributed.init().rank() + 1  # the last machine has the first layers
    return sum(counts[later:]), sum(counts)


def summed(own: Counted, *names: str, stream: mx.Stream | None = None) -> Counted:
    """The same with what this machine counted replaced by what all of them did.

    Every machine has to ask at the same point of its work, where a step of the model could stand:
    one that does not lets the others wait for ever. So nothing asks on the way out of a process.

    Args:
        own: a dataclass.
        names: of those of its fields, integers, that are summed.
        stream: that the model runs in, because messages of two streams would mix; None for that of
            mlx-lm's `stream_generate`.
    """
    with mx.stream(stream or vars(import_module("mlx_lm.generate"))["generation_stream"]):
        mine = mx.array([getattr(own, name) for name in names], mx.int64)
        found: Any = mx.distributed.all_sum(mine).tolist()
    return cast(Counted, replace(cast(Any, own), **dict(zip(names, found, strict=True))))
