"""Beginnings of texts, read once: keys and values of their tokens, which no mask changes.

A mask changes what later tokens see of a beginning, not what it is, so gradients need nothing but
the few tokens behind it, and many lessons share one beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from leankv_mlx.cache.fetch import hand_out
from leankv_mlx.codec.rotation import rotation
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import UnsupportedError
from leankv_mlx.kernels import Backend, Mask, Rows, resolve_backend
from leankv_mlx.kernels.prefill_attention import prefill_attention
from leankv_mlx.mlx_lm.attachment import Attachment, own_caches
from leankv_mlx.mlx_lm.learned import asking_shapes
from leankv_mlx.mlx_lm.precision import weights_dtype
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK


@dataclass(frozen=True)
class Beginning:
    """What the caches of a model hold of the first tokens of a text.

    Attributes:
        tokens: how many they are.
        rows: of each cache that a mask is for, keys (after RoPE) and values [H, tokens, head_dim]
            as the cache keeps exact rows, by its place in the model's list.
        others: the model's own caches at the other places; not to be changed.
    """

    tokens: int
    rows: dict[int, Rows]
    others: dict[int, Any]

    def caches(self, made: dict[int, Any]) -> list[Any]:
        """A list for the model: `made` in the places of `rows`, copies of the others."""
        both = made | {place: deepcopy(cache) for place, cache in self.others.items()}
        return [both[place] for place in sorted(both)]


def places_of(model: nn.Module) -> list[int]:
    """The places of a model's list of caches that are compressed, which is what is learned for."""
    found = Attachment(model, CompressionConfig()).layer_configs
    return [place for place, config in enumerate(found) if config is not None]


def layers_of(model: nn.Module, what: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Those places, with KV heads and head_dim of each.

    Args:
        what: is to be done with them, for a message.

    Raises:
        UnsupportedError: the model's attention does not ask its caches, or layers have heads of
            several numbers or sizes.
    """
    places, caches = places_of(model), own_caches(model)
    shapes = asking_shapes(model, caches, [i in places for i in range(len(caches))], what)
    if len(set(shapes)) > 1:
        raise UnsupportedError(
            f"{what} does not go with this model, whose layers have heads of several numbers or "
            "sizes."
        )
    return places, shapes


def read(model: nn.Module, tokens: Sequence[int], stops: Sequence[int]) -> list[Beginning]:
    """Read a text once: its beginnings of so many tokens, ascending, which share their rows. To be
    used while `asking`."""
    caches = own_caches(model)
    held = {place: _Read() for place in places_of(model)}
    for place, cache in held.items():
        caches[place] = cache
    others: list[dict[int, Any]] = []
    done = 0
    for stop in stops:
        while done < stop:
            part = tokens[done : min(stop, done + PREFILL_CHUNK)]
            model(mx.array([list(part)]), cache=caches)
            mx.eval([cache.state for cache in caches])
            done += len(part)
        others.append({i: deepcopy(cache) for i, cache in enumerate(caches) if i not in held})
    dtype = weights_dtype(model)
    whole = {
        place: Rows(*(x.astype(dtype or x.dtype) for x in cache.rows))
        for place, cache in held.items()
    }
    found = []
    for stop, rest in zip(stops, others, strict=True):
        rows = {place: Rows(*(x[:, :stop] for x in each)) for place, each in whole.items()}
        mx.eval(list(rows.values()))
        found.append(Beginning(stop, rows, rest))
    mx.clear_cache()
    return found


_MASKS = "learning masks does not go with a model that masks tokens itself."


def check_causal(mask: Mask) -> None:
    """Whether a model masks nothing but what comes later, all that is computed here.

    Raises:
        UnsupportedError: it does.
    """
    if isinstance(mask, mx.array):
        raise UnsupportedError(_MASKS)


class Causal:
    """What the caches of lessons have in common."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """As mlx-lm's own caches make it where there is no sliding window.

        Raises:
            UnsupportedError: the model has one, or wants an array.
        """
        if return_array or window_size is not None:
            raise UnsupportedError(_MASKS)
        return "causal"


class _Read(Causal):
    """A cache that keeps all tokens as they are, with the fastest attention over them."""

    def __init__(self) -> None:
        self.offset = 0
        self.rows = Rows(mx.zeros((0,)), mx.zeros((0,)))
        self._backend: Backend = resolve_backend("auto")

    @property
    def state(self) -> Rows:
        """All tokens."""
        return self.rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [1, H, L, head_dim] of the next tokens."""
        new = Rows(keys[0], values[0])
        if self.offset:
            new = Rows(*(mx.concatenate(list(x), axis=1) for x in zip(self.rows, new, strict=True)))
        mx.eval(new)  # layer by layer: a graph of all of them would hold all their inputs
        self.rows = new
        self.offset += keys.shape[2]
        return hand_out((new.k[None], new.v[None]), self)

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: Mask,
        sink_logits: mx.array | None = None,
    ) -> mx.array:
        """See `cache.fetch.Attends`."""
        check_causal(mask)
        plain = (rotation("none", self.rows.k.shape[2]), rotation("none", self.rows.v.shape[2]))
        rows = Rows(*(r.apply(x) for r, x in zip(plain, self.rows, strict=True)))
        out = prefill_attention(
            queries[0], rows, scale=scale, mask="causal", present=None, sink_logits=sink_logits,
            rotations=plain, backend=self._backend,
        )  # fmt: skip
        return out[None]
