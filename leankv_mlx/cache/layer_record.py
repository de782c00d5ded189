"""A compressed layer in a prompt cache file: its settings and numbers in the header, its packed
blocks in use head by head and in order, so that no block ids are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from leankv_mlx.cache.compressed import CompressedKVCache
from leankv_mlx.cache.container import DamagedError
from leankv_mlx.cache.state import (
    BasisState,
    BodyState,
    CacheState,
    ChannelsState,
    LayerState,
    TierState,
)
from leankv_mlx.cache.tier import Share
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.equalize import LARGEST
from leankv_mlx.codec.format import TILE, Format, padded
from leankv_mlx.codec.space import Learned
from leankv_mlx.config import BackendName, CompressionConfig
from leankv_mlx.kernels import Centers, Rows

LAYERS = "its layers are damaged"
_COUNTS = "its numbers of tokens contradict each other"
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_POSITIONS = (mx.uint8, mx.uint16, mx.uint32)
_NUMBERS = {
    "offset": (0, 1 << 24),  # 0: it was trimmed to nothing
    "heads": (1, 1 << 14),
    "k_dim": (1, 1 << 14),
    "v_dim": (1, 1 << 14),
}
_SPARE = 1 << 20  # bytes that the tables of a layer may take whatever its blocks take
_MAX_SPEC = 1000

Tensors = dict[str, mx.array]


def written(cache: CompressedKVCache, name: str, tensors: Tensors) -> dict[str, Any]:
    """What the header says about a layer; its arrays go to `tensors`, under names that begin with
    its own."""
    state = cache.state
    record: dict[str, Any] = {
        "kv": cache.config.portable.spec(),
        "keep_fetched": state.keep_fetched,
    }
    arrays: dict[str, mx.array | None] = {}
    if state.channels is not None:
        arrays = {"order": state.channels.order, "groups": state.channels.groups}
    if state.basis is not None:
        arrays = {"basis": state.basis.matrix, "costs": state.basis.costs}
    if (layer := state.layer) is not None:
        record |= {field: getattr(layer, field) for field in _NUMBERS}
        if state.channels is not None:
            record["narrowed"] = layer.narrowed
        arrays |= {"k": layer.exact.k, "v": layer.exact.v}
    if layer is not None and (body := layer.body) is not None:
        arrays |= {"mu_k": body.centers.k, "mu_v": body.centers.v, "key_scales": body.key_scales}
        for i, tier in enumerate(body.tiers):
            arrays |= {f"{i}.{field}": array for field, array in _in_order(tier).items()}
    tensors |= {f"{name}.{field}": x for field, x in arrays.items() if x is not None}
    return record


def _in_order(tier: TierState) -> dict[str, mx.array | None]:
    """Its arrays, with the blocks in use head by head and in order instead of their ids."""
    table, owned = np.array(tier.ids), -(-np.array(tier.lengths) // TILE)
    used = table[np.arange(table.shape[1]) < owned[:, None]]
    return {
        "lengths": tier.lengths,
        "blocks": tier.blocks[mx.array(used)] if len(used) else tier.blocks[:0],
        "positions": tier.positions,
        "marks": tier.marks,
    }


def read(
    record: dict[str, Any], name: str, tensors: Tensors, backend: BackendName, equalized: bool
) -> CompressedKVCache:
    """The layer that was written; takes its arrays out of `tensors`.

    Args:
        equalized: whether settings that do not speak of `equalize` mean that it is on.

    Raises:
        DamagedError: they do not make a layer.
        ConfigError: its settings are not understood, or name a mask or a basis that the file does
            not hold.
    """
    kv, keep_fetched = record.get("kv"), record.get("keep_fetched")
    if not isinstance(kv, str) or len(kv) > _MAX_SPEC or not isinstance(keep_fetched, bool):
        raise DamagedError(LAYERS)
    config = CompressionConfig.parse(kv, stored=True)
    if not equalized and "equalize=on" not in kv:
        config = replace(config, equalize=False)
    layer, stored = None, _stored(name, tensors)
    learned = stored.learned()
    narrows = stored.channels is not None
    if len(record) > 2:
        narrowed = record.get("narrowed", False)
        wanted = {"kv", "keep_fetched", *_NUMBERS, *(["narrowed"] if narrows else [])}
        if record.keys() != wanted or not isinstance(narrowed, bool):
            raise DamagedError(LAYERS)
        numbers = [_number(record, field) for field in _NUMBERS]
        layer = _Content(config, numbers, name, tensors, learned, narrowed).layer()
    kv = replace(config, backend=backend).spec()
    state = stored._replace(kv=kv, keep_fetched=keep_fetched, layer=layer)
    return CompressedKVCache.from_state(state)


def _stored(name: str, tensors: Tensors) -> CacheState:
    """A state with nothing but what was learned of the keys, if anything was."""
    empty = CacheState("", False)
    if f"{name}.basis" in tensors:
        basis = BasisState(tensors.pop(f"{name}.basis"), tensors.pop(f"{name}.costs", mx.array(0)))
        for array, shape in zip(basis, (basis.matrix.shape, basis.matrix.shape[:2]), strict=True):
            _expect(array, shape, (mx.float16,))
        return empty._replace(basis=basis)
    if f"{name}.order" not in tensors:
        return empty
    order, groups = tensors.pop(f"{name}.order"), tensors.pop(f"{name}.groups", mx.array(0))
    if order.ndim != 2 or not order.size:
        raise DamagedError("it has a tensor of the wrong shape or dtype")
    _expect(order, order.shape, (mx.int32,))
    _expect(groups, order.shape[:1], (mx.int32,))
    return empty._replace(channels=ChannelsState(order, groups))


def check_finite(array: mx.array) -> None:
    """Whether floats are numbers.

    Raises:
        DamagedError: one is infinite or not a number.
    """
    if not mx.isfinite(array).all().item():
        raise DamagedError("it has values that are no numbers")


class _Content:
    """The arrays of a layer, checked against its numbers."""

    def __init__(
        self,
        config: CompressionConfig,
        numbers: Sequence[int],
        name: str,
        tensors: Tensors,
        learned: Learned | None,
        narrowed: bool,
    ) -> None:
        self._config = config
        self._offset, self._heads, self._k_dim, self._v_dim = numbers
        self._name = name
        self._tensors = tensors
        self._learned = learned
        self._narrowed = narrowed
        self._exact = 0

    def layer(self) -> LayerState:
        """All of it."""
        heads, k_pad, v_pad = self._heads, padded(self._k_dim), padded(self._v_dim)
        learned = self._learned
        if learned and (learned.heads, learned.head_dim) != (heads, self._k_dim):
            raise DamagedError("its mask or basis is that of another shape")
        k, v = self._take("k"), self._take("v")
        exact = self._exact = k.shape[1] if k.ndim == 3 else 0
        _expect(k, (heads, exact, k_pad), _FLOATS)
        _expect(v, (heads, exact, v_pad), _FLOATS)
        if not self._has("mu_k"):
            if self._offset != exact:
                raise DamagedError(_COUNTS)
            return self._state(Rows(k, v))
        if not self._config.sink_tokens <= exact <= self._offset or not self._offset:
            raise DamagedError(_COUNTS)
        mu_k, mu_v = self._take("mu_k"), self._take("mu_v")
        _expect(mu_k, (heads, k_pad), (mx.float32,))
        _expect(mu_v, (heads, v_pad), (mx.float32,))
        formats = [Format.of(*bits, self._k_dim, self._v_dim) for bits in self._config.tiers]
        kept = learned if isinstance(learned, Channels) and self._narrowed else None
        shares = Share.all_of(formats, kept)
        placed = [(format, share) for share in shares for format in share.formats]
        lost = self._has("0.positions")
        tiers = [self._tier(i, *of, lost) for i, of in enumerate(placed)]
        if lost:
            self._check_positions(tiers)
        else:
            self._check_in_order(shares, tiers)
        scales = self._key_scales() if self._config.equalizes else None
        body = BodyState(Centers(mu_k, mu_v), tiers, scales)
        return self._state(Rows(k, v), body)

    def _state(self, exact: Rows, body: BodyState | None = None) -> LayerState:
        sizes = self._heads, self._k_dim, self._v_dim
        return LayerState(self._offset, *sizes, exact, body, self._narrowed)

    def _key_scales(self) -> mx.array:
        scales = self._take("key_scales")
        _expect(scales, (self._heads, self._k_dim), (mx.float32,))
        divisors = np.array(scales)
        if divisors.min() < np.float32(1 / LARGEST) or divisors.max() > np.float32(LARGEST):
            raise DamagedError("its channels are scaled beyond what is ever written")
        return scales

    def _tier(self, index: int, format: Format, share: Share, lost: bool) -> TierState:
        heads = self._heads
        lengths, blocks = self._take(f"{index}.lengths"), self._take(f"{index}.blocks")
        _expect(lengths, (heads,), (mx.int32,))
        slots = np.array(lengths).astype(np.int64)
        others = np.ones(heads, bool)
        others[share.rows] = False
        if slots.min() < 0 or slots.max() > self._offset or slots[others].any():
            raise DamagedError(_COUNTS)
        owned = -(-slots // TILE)
        _expect(blocks, (int(owned.sum()), format.words), (mx.uint32,))
        check_finite(blocks[:, -TILE:].view(mx.float16))  # the scales, see codec/packing.py
        width = int(owned.max())
        # A head has a column for each block of the longest one, and other arrays one for each slot.
        # Beside the blocks of a layer that was written that is little, however much longer one head
        # is than the others; with heads of which no model has so many it would take any amount.
        if 4 * heads * width > blocks.nbytes // 4 + _SPARE:
            raise DamagedError(_COUNTS)
        here = np.arange(width) < owned[:, None]
        ids = np.zeros((heads, width), np.int32)
        ids[here] = np.arange(int(owned.sum()))
        positions = marks = None
        if lost:
            positions, marks = self._take(f"{index}.positions"), self._take(f"{index}.marks")
            _expect(positions, (int(slots.sum()),), _POSITIONS)
            _expect(marks, (int(slots.sum()),), (mx.uint8,))
        return TierState(blocks, mx.array(ids), lengths, positions, marks)

    def _check_in_order(self, shares: list[Share], tiers: list[TierState]) -> None:
        """Every head that holds any has every token between the sink tokens and the window, in full
        blocks of its high tier."""
        blocks, rest = divmod(self._offset - self._exact, TILE)
        if not shares and self._offset > self._exact:
            return  # nothing is stored, so it may have been cut anywhere
        if blocks < 1 or rest:
            raise DamagedError(_COUNTS)
        left = iter(tiers)
        for share in shares:
            first, *others = (np.array(next(left).lengths)[share.rows] for _ in share.formats)
            if (first != blocks * TILE).any() or any(x.any() for x in others):
                raise DamagedError(_COUNTS)

    def _check_positions(self, tiers: list[TierState]) -> None:
        """A head has a token once at most, between the sink tokens and the window."""
        sinks = self._config.sink_tokens
        end = self._offset - (self._exact - sinks)
        of_head = [np.repeat(np.arange(self._heads), np.array(tier.lengths)) for tier in tiers]
        at = np.concatenate([np.array(tier.positions).astype(np.int64) for tier in tiers])
        if ((at < sinks) | (at >= end)).any():
            raise DamagedError(_COUNTS)
        each = np.unique(np.concatenate(of_head) * np.int64(end) + at)
        if len(each) != len(at):
            raise DamagedError(_COUNTS)

    def _has(self, what: str) -> bool:
        return f"{self._name}.{what}" in self._tensors

    def _take(self, what: str) -> mx.array:
        name = f"{self._name}.{what}"
        if name not in self._tensors:
            raise DamagedError(f"it lacks the tensor {name[:40]!r}")
        return self._tensors.pop(name)


def _number(record: dict[str, Any], name: str) -> int:
    """A whole number within what `_NUMBERS` allows."""
    value, (low, high) = record.get(name), _NUMBERS[name]
    if type(value) is not int or not low <= value <= high:
        raise DamagedError(LAYERS)
    return value


def _expect(array: mx.array, shape: tuple[int, ...], dtypes: tuple[mx.Dtype, ...]) -> None:
    """Of floats also that each is a number: one that is none makes every answer nonsense."""
    if array.shape != shape or array.dtype not in dtypes:
        raise DamagedError("it has a tensor of the wrong shape or dtype")
    if mx.issubdtype(array.dtype, mx.floating):
        check_finite(array)
