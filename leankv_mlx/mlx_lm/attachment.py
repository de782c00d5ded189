"""`attach`: make a model of mlx-lm use compressed KV caches, with an exact undo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache import CompressedKVCache, Sequence
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.space import Learned
from leankv_mlx.config import UNCOMPRESSED, CompressionConfig
from leankv_mlx.errors import ModelError, UnsupportedError
from leankv_mlx.kernels import resolve_backend
from leankv_mlx.mlx_lm import patches
from leankv_mlx.mlx_lm.group import machines_of, place, stages_of
from leankv_mlx.mlx_lm.learned import kept, resolved
from leankv_mlx.mlx_lm.precision import weights_dtype
from leankv_mlx.mlx_lm.projecting import projections_of
from leankv_mlx.mlx_lm.quirks import left_alone, quirks_of
from leankv_mlx.mlx_lm.sparse import sparsity_of
from leankv_mlx.projections import ProjectionReport, is_attached, report
from leankv_mlx.projections.sparsity import Sparsity

_MISSING = object()
_LOCK = threading.Lock()


@dataclass(frozen=True)
class LayerReport:
    """What happens to one entry of the model's cache list.

    Attributes:
        index: its place in the list.
        cache: class that the model itself would use.
        compressed: whether it is replaced.
        reason: why not, or how it is compressed.
        attention: "fused" or "fallback" as seen in the last cache that ran, "" before.
    """

    index: int
    cache: str
    compressed: bool
    reason: str
    attention: str = ""


class _MakeCache:
    """What stands in for a model's `make_cache` while at least one attachment is active."""

    def __init__(self, model: nn.Module) -> None:
        self.previous = vars(model).get("make_cache", _MISSING)
        self.original = _original_make_cache(model)
        self.active: list[Attachment] = []

    def __call__(self) -> list[Any]:
        return self.active[-1]._make(self.original())


def _original_make_cache(model: nn.Module) -> Callable[[], list[Any]]:
    make: Callable[[], list[Any]] | None = getattr(model, "make_cache", None)
    if make is not None:
        return make
    from mlx_lm.models.cache import KVCache

    if not hasattr(model, "layers"):
        raise ModelError(
            f"{type(model).__name__} has neither make_cache nor layers; give a model of mlx-lm."
        )
    return lambda: [KVCache() for _ in model.layers]


class Attachment:
    """Compressed caches for one model: a context manager, or `start()` and `stop()`.

    Attachments nest: caches are made by the one that started last and is still active. They can
    end in any order; the last one restores the model and its modules exactly.

    The list of caches that was made last is held until the next one is made or the attachment
    ends, so that `report` can tell how attention ran.

    Attributes:
        config: the settings, with the digest of their mask or basis: what is stored is named by
            them.
        learned: of each entry of the model's cache list, which channels of its keys are kept, or
            their basis; None for all as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig,
        sparsity: Sparsity | None = None,
        learned: Iterable[Learned] | None = None,
    ) -> None:
        self.model = model
        self.config = config  # what it names gets its digest below
        self.backend: str = resolve_backend(config.backend).name
        quirks = quirks_of(model)
        self._refusal = next((quirk.reason for quirk in quirks if not quirk.compress), None)
        self._keep_fetched = any(quirk.keep_fetched for quirk in quirks)
        self._targets = patches.targets(model)
        self._depth = 0
        self._maker: _MakeCache | None = None
        self._caches: list[Any] | None = None
        self._final: list[str] = []
        self._exact_dtype = weights_dtype(model)
        self._entries = own_caches(model)
        compressed = [self._reason(entry) is None for entry in self._entries]
        self.config, self.learned = resolved(model, config, own_caches(model), compressed, learned)
        self.machines = machines_of(model)
        layers = self.compressed_layers
        self._place = place(model, layers) if config.layer_bits else (0, layers)
        self._sparsity = sparsity or sparsity_of(model, config.sparse, config.projections)
        self._projections = projections_of(model, config.projections, inputs=self._sparsity)

    def start(self) -> Attachment:
        """Begin; every call needs its `stop`."""
        with _LOCK:
            self._depth += 1
            if self._depth > 1:
                return self
            register()
            current = vars(self.model).get("make_cache")
            if not isinstance(current, _MakeCache):
                current = _MakeCache(self.model)
                self.model.make_cache = current
            current.active.append(self)
            self._maker = current
            patches.patch(self._targets)
        try:
            self._projections.start()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End; does nothing if it is not active."""
        with _LOCK:
            self._depth = max(0, self._depth - 1)
            if self._depth or self._maker is None:
                return
            self._projections.stop()
            self._final = self._attention()
            self._caches = None
            patches.unpatch(self._targets)
            current, self._maker = self._maker, None
            current.active.remove(self)
            # Whoever replaced make_cache after us keeps their replacement.
            if not current.active and vars(self.model).get("make_cache") is current:
                del self.model.make_cache
                if current.previous is not _MISSING:
                    self.model.make_cache = current.previous

    def __enter__(self) -> Attachment:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _make(self, entries: list[Any]) -> list[Any]:
        sequence = Sequence(self.config.policy, self.config.scorer)
        self._caches = [
            CompressedKVCache(
                config, self._keep_fetched, self._exact_dtype, sequence, learned=learned
            )
            if config
            else entry
            for entry, config, learned in zip(
                entries, self.layer_configs, self.learned, strict=True
            )
        ]
        return self._caches

    @property
    def layer_configs(self) -> list[CompressionConfig | None]:
        """The settings of each entry of the model's cache list; None for one that is not replaced.

        Raises:
            ConfigError: layer_bits is for a model with another number of compressed layers.
        """
        before, layers = self._place
        numbers = count(before)
        return [
            self.config.for_layer(next(numbers), layers) if self._reason(entry) is None else None
            for entry in self._entries
        ]

    def _reason(self, entry: Any) -> str | None:
        """Why a cache of the model is left alone; None if it is replaced."""
        from mlx_lm.models.cache import KVCache

        if type(entry) is not KVCache:
            return left_alone(entry)
        return self._refusal

    def _attention(self) -> list[str]:
        if self._caches is None:
            return self._final
        return [_attention_of(cache) for cache in self._caches]

    @property
    def report(self) -> list[LayerReport]:
        """One row per entry of the model's cache list."""
        attention = self._attention() or [""] * len(self._entries)
        rows = []
        for index, (entry, path) in enumerate(zip(self._entries, attention, strict=True)):
            refused = self._reason(entry)
            reason = self.config.spec() if refused is None else refused
            if isinstance(channels := self.learned[index], Channels):
                reason += f"; {kept(channels)}"
            if refused is None and path == "fallback" and self.config.policy.drops:
                reason += "; keeps every token, because its attention does not go through the cache"
            if refused is None and self.machines > 1 and self.config.policy.limit:
                reason += f"; its bytes are those of each of {self.machines} machines"
            rows.append(LayerReport(index, type(entry).__name__, refused is None, reason, path))
        return rows

    @property
    def projections(self) -> list[ProjectionReport]:
        """One row per quantized layer of the model: whether its products are native, or why not;
        empty with MLX's own."""
        return report(self.model) if self._projections.native else []

    @property
    def weights_read(self) -> float:
        """Share of the bytes of the layers' weights that the last step read; below 1 with sparse=
        only."""
        return self._sparsity.weights_read if self._sparsity else 1.0

    @property
    def caches(self) -> list[Any]:
        """The list that was made last; empty before the first and after the end."""
        return self._caches or []

    @property
    def compressed_layers(self) -> int:
        """Cache entries that are compressed; 0 means that the model runs as it would without."""
        return sum(self._reason(entry) is None for entry in self._entries)


def _attention_of(cache: Any) -> str:
    if not isinstance(cache, CompressedKVCache) or cache.empty():
        return ""
    return "fused" if cache.fused_calls else "fallback"


def products_of(model: nn.Module, attachment: Attachment | None) -> AbstractContextManager[object]:
    """A context, to be entered any number of times, in which the model's products are those of an
    attachment, whichever started last; with None those that they are now, and nothing is left out.
    """
    if attachment is not None:
        return attachment._projections
    if not report(model):
        return nullcontext()
    return projections_of(model, "native" if is_attached(model) else "mlx")


def attach(
    model: nn.Module,
    config: CompressionConfig | str = "leankv",
    sparsity: Sparsity | None = None,
    learned: Iterable[Learned] | None = None,
) -> Attachment:
    """Make `model` use compressed KV caches while the result is active.

    Args:
        model: a model of mlx-lm.
        config: settings, or their text form as in `--kv`.
        sparsity: what decode steps leave out, in place of the calibration that `sparse` names.
        learned: of each layer that is compressed, in order, in place of the mask that `mask`
            names, or the basis that `basis` names.

    Returns:
        A context manager; outside of `with`, call `start()` and `stop()`.

    Raises:
        ConfigError: the text is not understood, or what was learned is not what it names.
        BackendUnavailableError: the configured backend cannot run here.
        CalibrationError: the model was not calibrated for what `sparse` leaves out, or has no such
            mask or basis.
        ModelError: the heads of the model cannot be split over so many machines.
        UnsupportedError: `sparse`, `mask` or `basis` on a model that is split over several
            machines, or `mask` or `basis` on one whose attention does not ask the cache.
    """
    if isinstance(config, str):
        config = CompressionConfig.parse(config)
    if (machines := machines_of(model)) > 1:
        for name in ("sparse", "mask", "basis"):
            if value := getattr(config, name):
                raise UnsupportedError(
                    f"{name}={value} works with a whole model; drop it, or use one machine."
                )
        if stages_of(model) == 1:
            _check_split(model, machines)
    return Attachment(model, config, sparsity, learned)


def _check_split(model: nn.Module, machines: int) -> None:
    """mlx-lm splits heads without counting them, and the first request would fail."""
    try:
        model(mx.array([[1]]), cache=own_caches(model))  # never computed
    except ValueError as error:
        raise ModelError(
            f"this model's heads cannot be split over {machines} machines; use another number of "
            "them, or --pipeline."
        ) from error


def backend_of(attachment: Attachment | None) -> str:
    """What runs the kernels, "none" where nothing is compressed."""
    return UNCOMPRESSED if why_not(attachment) or attachment is None else attachment.backend


def why_not(attachment: Attachment | None) -> str:
    """Why nothing is compressed; "" where something is."""
    if attachment is None:
        return "the cache is not compressed"
    if attachment.compressed_layers:
        return ""
    return "; ".join(dict.fromkeys(row.reason for row in attachment.report))


def own_caches(model: nn.Module) -> list[Any]:
    """The cache list that the model itself makes, attached or not."""
    current = vars(model).get("make_cache")
    make = current.original if isinstance(current, _MakeCache) else _original_make_cache(model)
    return make()


def make_caches(model: nn.Module) -> list[Any]:
    """The cache list for one new sequence: mlx-lm's `make_prompt_cache`."""
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Any] = make_prompt_cache(model)
    return made


def register() -> None:
    """Let mlx-lm's `load_prompt_cache` find our class, which it looks up by name.

    It stays registered: a file may be loaded after the attachment has ended, and the name shadows
    nothing.
    """
    from mlx_lm.models import cache

    vars(cache).setdefault(CompressedKVCache.__name__, CompressedKVCache)
