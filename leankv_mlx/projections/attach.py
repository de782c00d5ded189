"""`attach`: make the quantized layers of a model compute through `project`, with an exact undo."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from leankv_mlx.errors import BackendUnavailableError
from leankv_mlx.projections.backends import resolve_backend
from leankv_mlx.projections.inputs import Input, Inputs, input_of
from leankv_mlx.projections.layers import ARRAYS, PLAIN, RELAID, Held, Relaid
from leankv_mlx.projections.weight import BITS, GROUPS

Undo = Callable[[], None]
Fuse = Callable[[nn.Module], Undo]
"""Makes larger parts of a model use its relaid layers, and returns what undoes that."""

_HOME = "_leankv_projections"
_LOCK = threading.RLock()


@dataclass(frozen=True)
class ProjectionReport:
    """What happens to one quantized layer of the model.

    Attributes:
        name: its path in the model.
        reason: why it is left alone; "" if it computes through `project`.
        at: the input that it multiplies, where that is known.
    """

    name: str
    reason: str
    at: Input | None


class Projections:
    """One use of a model's layers: a context manager, or `start()` and `stop()`.

    They nest and may end in any order: the one that started last and is still active decides. The
    last one to end leaves the parameters bit for bit as they were.

    Args:
        native: whether layers compute through `project`; False is MLX's own products.
        inputs: what is done with the inputs of the products.
        fuse: done to the model while this decides.
        lazy: relay each layer when it is first used.
    """

    def __init__(
        self,
        model: nn.Module,
        native: bool = True,
        inputs: Inputs | None = None,
        fuse: Fuse | None = None,
        lazy: bool = False,
    ) -> None:
        self._model = weakref.ref(model)  # which holds this while it is active
        self.native = native
        self.inputs = inputs if native else None
        self.fuse = fuse if native else None
        self.lazy = lazy

    def start(self) -> Projections:
        """Begin; every call needs its `stop`."""
        with _LOCK:
            model = self._model()
            assert model is not None  # somebody holds it who starts this
            home = getattr(model, _HOME, None) or _Home(model)
            home.active.append(self)
            try:
                home.settle()
            except BaseException:
                self.stop()
                raise
        return self

    def stop(self) -> None:
        """End; does nothing if it is not active."""
        with _LOCK:
            home: _Home | None = getattr(self._model(), _HOME, None)
            if home is not None and self in home.active:
                at = len(home.active) - 1 - home.active[::-1].index(self)
                del home.active[at]
                home.settle()

    def __enter__(self) -> Projections:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def attach(
    model: nn.Module,
    inputs: Inputs | None = None,
    fuse: Fuse | None = None,
    lazy: bool = False,
) -> Projections:
    """Make the model's quantized layers compute through `project` while the result is active.

    Each layer is relaid in place, so that the model takes no more memory than before and at most
    one layer is there twice. Layers that are not known exactly are left alone; `report` says which.

    Args:
        inputs: what is done with the inputs of the products.
        fuse: makes larger parts of the model use the layers; called when they are relaid.
        lazy: relay each layer when it is first used.
    """
    return Projections(model, True, inputs, fuse, lazy)


def report(model: nn.Module) -> list[ProjectionReport]:
    """One row for each quantized layer of a model, attached or not."""
    modules = dict(model.named_modules())
    rows = []
    for name, module in modules.items():
        if isinstance(module, Relaid) or "scales" in module:
            parent = modules.get(name.rpartition(".")[0])
            rows.append(ProjectionReport(name, _reason(module, parent), input_of(name)))
    return rows[::-1]  # in the order of the model


def is_attached(model: nn.Module) -> bool:
    """Whether the model's layers compute through `project` now."""
    home: _Home | None = getattr(model, _HOME, None)
    return home is not None and home.native


def inputs_of(model: nn.Module) -> Inputs | None:
    """What is done with the inputs of the model's products now."""
    home: _Home | None = getattr(model, _HOME, None)
    return None if home is None else home.inputs


def why_not_native() -> str:
    """Why the products do not run natively here; "" if they do."""
    try:
        resolve_backend("cpu")
    except BackendUnavailableError as error:
        return str(error)
    return ""


class _Home:
    """A model's layers, and who uses them. The model holds it and it holds no part of the model: a
    model that is dropped while it is attached is gone at once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.active: list[Projections] = []
        self.native = False
        self.inputs: Inputs | None = None
        self._layers: list[weakref.ref[Relaid]] = []
        self._fuse: Fuse | None = None
        self._unfuse: Undo | None = None
        # A plain attribute: no parameter, and gone with the model.
        object.__setattr__(model, _HOME, self)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model is not attached."""

    def settle(self) -> None:
        """Do what the use that started last asks for."""
        model = self._model()
        assert model is not None  # only who holds it comes here
        top = self.active[-1] if self.active else Projections(model, native=False)
        if top.fuse is not self._fuse or top.native != self.native:
            self._change_fuse(model, None)
        if top.native and not self.native:
            self._relay(model, top.lazy)
        elif self.native and not top.native:
            self._restore()
        self.inputs = top.inputs
        self._change_fuse(model, top.fuse)
        if not self.active:
            object.__delattr__(model, _HOME)

    def _change_fuse(self, model: nn.Module, fuse: Fuse | None) -> None:
        if fuse is self._fuse:
            return
        if self._unfuse is not None:
            self._unfuse()
        self._fuse, self._unfuse = fuse, fuse(model) if fuse else None

    def _relay(self, model: nn.Module, lazy: bool) -> None:
        self.native = True
        modules = dict(model.named_modules())
        ours = {row.name: row for row in report(model)}
        alone = {id(modules[name]) for name, row in ours.items() if row.reason}
        shared: defaultdict[tuple[int, ...], list[Relaid]] = defaultdict(list)
        for name, row in ours.items():
            layer: Any = modules[name]
            if isinstance(layer, Relaid) and layer.held.at != row.at:
                layer.held.at = None  # it stands in two places
            if id(layer) in alone or isinstance(layer, Relaid):
                continue
            shared[tuple(id(layer[array]) for array in ARRAYS)].append(layer)
            object.__setattr__(layer, "held", Held(self, row.at))
            layer.__class__ = RELAID[type(layer)]
            self._layers.append(weakref.ref(layer))
        if lazy:
            return
        for first, *others in shared.values():
            weight, scales = first.relaid(), first.held.scales
            for other in others:
                other.hold(weight, scales)

    def _restore(self) -> None:
        self.native = False
        shared: defaultdict[int, list[Relaid]] = defaultdict(list)
        for layer in (found() for found in self._layers):
            if layer is not None:
                shared[id(layer.held.weight or layer)].append(layer)
        while shared:
            _, layers = shared.popitem()
            arrays = layers[0].shown()
            mx.eval(arrays)
            for layer in layers:
                layer.put_back(arrays)
                cast(Any, layer).__class__ = PLAIN[type(layer)]
                object.__delattr__(layer, "held")
        self._layers = []


def _reason(layer: Any, parent: nn.Module | None) -> str:
    """Why a quantized layer is left alone; "" if it is not."""
    if not isinstance(layer, Relaid) and type(layer) not in RELAID:
        return f"{type(layer).__name__} computes in its own way"
    if layer.mode != "affine":
        return f"its codes are {layer.mode}, not affine"
    if layer.bits not in BITS or layer.group_size not in GROUPS:
        return f"{layer.bits} bits in groups of {layer.group_size}"
    if parent is not None and "lora_a" in parent:
        return f"it is part of an adapter ({type(parent).__name__})"
    return ""
