"""Patches with exact undo: `scaled_dot_product_attention` in a model's modules, and mlx-lm's loops.

mlx-lm's models bind the function by name, so it is replaced where they look it up. A module that
several attached models share is patched once and restored when the last of them leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache import owner_of
from leankv_mlx.mlx_lm.loops import LOOPS, loop_namespaces
from leankv_mlx.terminal import printable

NAME = "scaled_dot_product_attention"
_OURS = "_leankv"

Namespace = dict[str, Any]
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Target:
    """A name of a module, and what makes its replacement of the original."""

    namespace: Namespace
    name: str
    make: Callable[[Any], Any]

    @property
    def key(self) -> tuple[int, str]:
        """The same for all targets that replace the same."""
        return id(self.namespace), self.name


class _Patch:
    """The replacement of one name; `users` attachments need it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.users = 0
        self.original = target.namespace[target.name]
        self.replacement = target.make(self.original)

    def apply(self) -> None:
        self.target.namespace[self.target.name] = self.replacement

    def undo(self) -> None:
        # Whoever patched after us keeps their patch; ours below it only passes calls on.
        if self.target.namespace.get(self.target.name) is self.replacement:
            self.target.namespace[self.target.name] = self.original


_PATCHES: dict[tuple[int, str], _Patch] = {}


def _dispatching(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def scaled_dot_product_attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        fetched = owner_of(keys, values)
        if fetched is None:
            return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
        return fetched.attend(queries, scale=scale, mask=mask, sink_logits=sinks)

    vars(scaled_dot_product_attention)[_OURS] = True
    return scaled_dot_product_attention


def dispatches(attention: Callable[..., mx.array]) -> bool:
    """Whether a model's attention function is ours, which asks the cache that K/V came from."""
    return _OURS in vars(attention)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` for the time of the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def printing(module: ModuleType) -> Iterator[None]:
    """What the functions of a module print passes the border to the terminal."""

    def printed(*values: object, **options: Any) -> None:
        print(*(printable(str(value)) for value in values), **options)

    vars(module)["print"] = printed
    try:
        yield
    finally:
        del vars(module)["print"]


def attention_namespaces(model: nn.Module) -> list[Namespace]:
    """Globals of the modules that define the model's classes and bind the attention function.

    They are found through the functions of the classes, not through `sys.modules`: a model that
    brings its own file is not listed there.
    """
    found: dict[int, Namespace] = {}
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    for cls in classes:
        for function in vars(cls).values():
            if isinstance(function, FunctionType) and NAME in function.__globals__:
                found[id(function.__globals__)] = function.__globals__
    return list(found.values())


def targets(model: nn.Module) -> list[Target]:
    """Everything that is replaced while a model is attached."""
    attention = [Target(found, NAME, _dispatching) for found in attention_namespaces(model)]
    loops = [
        Target(found, name, make) for found in loop_namespaces() for name, make in LOOPS.items()
    ]
    return [*attention, *loops]


def patch(targets: Iterable[Target]) -> None:
    """Patch, or count one more user of, each target."""
    with _LOCK:
        for target in targets:
            found = _PATCHES.get(target.key)
            if found is None:
                found = _PATCHES[target.key] = _Patch(target)
                found.apply()
            found.users += 1


def unpatch(targets: Iterable[Target]) -> None:
    """Count one user less of each target; the last one restores it."""
    with _LOCK:
        for target in targets:
            found = _PATCHES[target.key]
            found.users -= 1
            if found.users == 0:
                del _PATCHES[target.key]
                found.undo()


@contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """Inside of the block the model's attention asks what its arrays stand for, see
    `cache.owner_of`, without caches of this package being made."""
    patched = targets(model)
    patch(patched)
    try:
        yield
    finally:
        unpatch(patched)
