"""Patches with exact undo, above all of `scaled_dot_product_attention` in a model's modules.

mlx-lm's models bind the function by name, so it is replaced where they look it up. A module that
several attached models share is patched once and restored when the last of them leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache import owner_of
from leankv_mlx.terminal import printable

NAME = "scaled_dot_product_attention"

Namespace = dict[str, Any]
_LOCK = threading.Lock()


class _Patch:
    """The replacement in one namespace; `users` attachments need it."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.users = 0
        self.original: Callable[..., mx.array] = namespace[NAME]
        self.replacement = _dispatching(self.original)

    def apply(self) -> None:
        self.namespace[NAME] = self.replacement

    def undo(self) -> None:
        # Whoever patched after us keeps their patch; ours below it only passes calls on.
        if self.namespace.get(NAME) is self.replacement:
            self.namespace[NAME] = self.original


_PATCHES: dict[int, _Patch] = {}


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

    return scaled_dot_product_attention


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


def patch(namespaces: Iterable[Namespace]) -> None:
    """Patch, or count one more user of, each namespace."""
    with _LOCK:
        for namespace in namespaces:
            found = _PATCHES.get(id(namespace))
            if found is None:
                found = _PATCHES[id(namespace)] = _Patch(namespace)
                found.apply()
            found.users += 1


def unpatch(namespaces: Iterable[Namespace]) -> None:
    """Count one user less of each namespace; the last one restores it."""
    with _LOCK:
        for namespace in namespaces:
            found = _PATCHES[id(namespace)]
            found.users -= 1
            if found.users == 0:
                del _PATCHES[id(namespace)]
                found.undo()
