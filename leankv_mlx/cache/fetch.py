"""What `update_and_fetch` hands out: arrays that stand for the tokens of a layer, and the attention
that reads the layer instead.

The arrays are lazy. If the model passes those very objects to attention they need never be
computed, so they are remembered by identity, as weak references; every other use of them computes
them and is right too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

import mlx.core as mx

from leankv_mlx.codec.space import Space
from leankv_mlx.errors import DroppedTokensError
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Mask, Rows, View
from leankv_mlx.kernels.decode_attention import decode_attention
from leankv_mlx.kernels.gather import gather, working_copy
from leankv_mlx.kernels.prefill_attention import prefill_attention

if TYPE_CHECKING:
    from leankv_mlx.cache.layer import Layer
    from leankv_mlx.cache.sequence import Sequence

Arrays = tuple[mx.array, mx.array]


@dataclass
class Calls:
    """What models do with the arrays of one cache; shared by its fetches.

    Attributes:
        fused: how often attention read the cache itself.
        reads: of the last decode call, see `kernels.types.Attention`.
    """

    fused: int = 0
    reads: mx.array | None = None

    def count(self, reads: mx.array | None) -> None:
        """A decode call."""
        self.fused += 1
        self.reads = reads


@dataclass(eq=False)
class Fetch:
    """All tokens of a layer at one moment. It must not hold the cache, which holds what it fetched.

    Attributes:
        layer: that it is of.
        rows: the working copy, if this is a prefill; None if it is to be made when it is needed.
        tokens: that came with this update; 0 if it is asked for between two.
        calls: counts that it adds to.
        sequence: that the layer is of; it is told of prefill calls.
    """

    layer: Layer
    rows: Rows | None
    tokens: int
    calls: Calls
    sequence: Sequence
    view: View = field(init=False)

    def __post_init__(self) -> None:
        layer = self.layer
        self.view = layer.view()
        self.space: Space = layer.space  # of the view: the layer's own may be fitted anew
        self.end = layer.offset
        self._observations, self._collector = layer.observations, layer.collector

    def arrays(self) -> Arrays:
        """Keys and values of all tokens, [1, H, N, head_dim], remembered until the keys die;
        `Withheld` once heads lack tokens, or are stored apart."""
        return hand_out(self._withheld() if self.layer.ragged else self.decoded(), self)

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """queries: [1, Hq, L, head_dim], the last L tokens -> [1, Hq, L, v_head_dim].

        Raises:
            DroppedTokensError: an array as mask although heads lack tokens, or are stored apart.
        """
        layer, lse, reads = self.layer, None, None
        q = mx.squeeze(self.space.queries(queries), 0)  # an index would be a gather
        if max(self.tokens, q.shape[1]) <= MAX_DECODE_TOKENS:
            out, lse, reads = decode_attention(
                q, self.view, scale=scale, mask=mask, sink_logits=sink_logits,
                backend=layer.backend,
            )  # fmt: skip
        else:
            out = self._prefill(q, scale, mask, sink_logits)
        self.attended(queries, lse, reads, scale, sink_logits)
        return out[None]

    @property
    def watches(self) -> bool:
        """Whether the layer wants to know what attended; if not, a decode call is only counted."""
        return self._observations is not None or (
            self.view.centers is None and self.layer.offset == self.end
        )

    def attended(
        self,
        queries: mx.array,
        lse: mx.array | None,
        reads: mx.array | None,
        scale: float,
        sink_logits: mx.array | None,
    ) -> None:
        """To be told to the layer once the queries have attended, [1, Hq, L, head_dim]; see
        `kernels.types.Attention` for what attention found."""
        layer = self.layer
        self.calls.fused += 1
        if self.tokens <= MAX_DECODE_TOKENS:
            self.calls.reads = reads
        if self._observations is not None:
            self._observations.add(queries[0], lse, self.end, scale, sink_logits)
        if self.view.centers is None and layer.offset == self.end:
            layer.see(queries, self.view.exact)
        if self.tokens > MAX_DECODE_TOKENS:
            self.sequence.after_prefill(layer)

    def _prefill(
        self, q: mx.array, scale: float, mask: Mask, sink_logits: mx.array | None
    ) -> mx.array:
        rows = self.rows or working_copy(self.view, self.layer.dtype, self.layer.backend)
        if self._collector is not None and self.tokens > MAX_DECODE_TOKENS:
            stored = slice(self.view.sinks, self.view.sinks + self.view.slots)
            rotated, present = self.space.rotations[0].apply(q), self.view.present()
            self._collector.add(rotated, rows.k, stored, scale, sink_logits, present)
        # Tiers of the same heads are out of order, and heads that all lost the same leave no gaps.
        whole = rows.k.shape[1] if len(self.view.tiers) <= 1 else -1
        if isinstance(mask, mx.array) and mask.shape[-1] != whole:
            raise DroppedTokensError
        return prefill_attention(
            q,
            rows,
            scale=scale,
            mask=mask,
            present=self.view.present(),
            sink_logits=sink_logits,
            rotations=self.space.rotations,
            backend=self.layer.backend,
        )

    def decoded(self) -> Arrays:
        """Lazy keys and values of all tokens."""
        if self.rows is not None:
            keys, values = self.space.undone(*self.rows)
        else:
            keys, values = gather(self.view, self.layer.dtype, self.layer.backend)
            keys = self.space.unscaled(keys)
        return keys[None], values[None]

    def _withheld(self) -> Arrays:
        tokens, shape = int(self.view.exact.k.shape[1]) + self.view.slots, self.layer.shape
        keys, values = (
            Withheld((1, shape.heads, tokens, dim), self.layer.dtype)
            for dim in (shape.k_dim, shape.v_dim)
        )
        return cast(mx.array, keys), cast(mx.array, values)


class Attends(Protocol):
    """What arrays can stand for."""

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """See `Fetch.attend`."""


_FETCHES: dict[int, tuple[weakref.ref[mx.array], weakref.ref[mx.array], Attends]] = {}


def hand_out(arrays: Arrays, fetch: Attends) -> Arrays:
    """The arrays, remembered to stand for a fetch until the keys die."""
    keys, values = arrays
    name = id(keys)

    def forget(_: weakref.ref[mx.array]) -> None:
        _FETCHES.pop(name, None)

    _FETCHES[name] = weakref.ref(keys, forget), weakref.ref(values), fetch
    return keys, values


def owner_of(keys: mx.array, values: mx.array) -> Attends | None:
    """The fetch that both arrays came from, by identity; None for any other array."""
    found = _FETCHES.get(id(keys))
    if found is None or found[0]() is not keys or found[1]() is not values:
        return None
    return found[2]


def _refuse(*_: object, **__: object) -> NoReturn:
    raise DroppedTokensError("reads keys and values itself")


class Withheld:
    """Stands for keys or values whose heads have lost tokens, or are stored apart because a mask
    keeps more channels of one than of another.

    As an array they would have gaps that only the attention behind `owner_of` knows of. So there
    is none: whoever uses this as one gets a DroppedTokensError, or a TypeError from functions of
    MLX that take nothing but its own arrays.

    Attributes:
        shape: [1, H, N, head_dim]; N of the head that kept most.
        dtype: of the model's keys and values.
        ndim: 4.
    """

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks what an object can do
            raise AttributeError(name)
        _refuse()

    __array__ = __mlx_array__ = __getitem__ = __setitem__ = __iter__ = __len__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __pow__ = __neg__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __rpow__ = _refuse
