"""`CompressedKVCache`: one layer's keys and values, compressed, behind mlx-lm's cache protocol."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from leankv_mlx.cache.fetch import Arrays, Calls, Fetch
from leankv_mlx.cache.layer import Layer
from leankv_mlx.cache.memory import CacheMemory
from leankv_mlx.cache.sequence import Sequence
from leankv_mlx.cache.shape import Shape
from leankv_mlx.cache.stage import Stage
from leankv_mlx.cache.state import CacheState
from leankv_mlx.codec.basis import Basis
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.space import Learned
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError, DroppedTokensError, ShapeError, UnsupportedError
from leankv_mlx.kernels import MAX_DECODE_TOKENS, Backend, Mask, Rows, View, resolve_backend


class CompressedKVCache(Stage):
    """What a model sees of a layer of a `Sequence`: sink tokens, a compressed body and a window of
    recent tokens, everything rotated.

    A call with up to 8 new tokens moves the oldest rows of a full window to the body first and
    keeps its own rows exact. A longer call (prefill) attends first and compresses within the call.

    Args:
        config: what to compress and how; a `--kv` text is read by `CompressionConfig.parse`.
        keep_fetched: hold the arrays of the last fetch until the next update, for models whose
            later layers ask for them through `keys_and_values` (they then get what was attended
            to, not its compressed form).
        exact_dtype: of the rows that stay uncompressed, float16 or bfloat16 for a model whose
            weights had no more but which computes in float32; None for that of keys and values.
        sequence: that the layer is of, one for all caches of a model; None for one of its own.
        learned: which key channels codes keep once the prompt is in, by the mask that the config
            names, or the basis of the keys that it names; None for all channels as they are.

    Raises:
        BackendUnavailableError: the configured backend cannot run here.
        ConfigError: the sequence has another policy or scorer, or the config names a mask or a
            basis and it did not come.
    """

    merge: ClassVar[Callable[[Iterable[CompressedKVCache]], Any]]
    """Makes a batch of caches; given by `cache.batch`, which stands above."""

    def __init__(
        self,
        config: CompressionConfig | str = "leankv",
        keep_fetched: bool = False,
        exact_dtype: mx.Dtype | None = None,
        sequence: Sequence | None = None,
        learned: Learned | None = None,
    ) -> None:
        self.config = CompressionConfig.parse(config) if isinstance(config, str) else config
        for name, kind in (("mask", Channels), ("basis", Basis)):
            if (value := getattr(self.config, name)) and not isinstance(learned, kind):
                raise ConfigError(
                    f"{name}={value} is known by its name alone; attach the model that it was "
                    "learned for."
                )
        self.learned = learned
        self.keep_fetched = keep_fetched
        self._exact_dtype = exact_dtype
        self._backend: Backend = resolve_backend(self.config.backend)
        self._layer: Layer | None = None  # made by the first update, which tells the shape
        self._sequence = Sequence(self.config.policy, self.config.scorer)
        if sequence is not None:
            self.join(sequence)
        self._calls = Calls()
        self._parts: int | None = None  # that have come of an update in parts
        self._unread = -1  # fused calls before a fetch whose arrays do not hold all tokens
        # Weak: a fetch holds the working copy of its layer.
        self._fetched: tuple[weakref.ref[mx.array], weakref.ref[mx.array]] | None = None
        self._held: Arrays | None = None

    # The cache protocol of mlx-lm.

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens and return all of them as lazy arrays.

        Args:
            keys: [1, H, L, k_head_dim], after RoPE.
            values: [1, H, L, v_head_dim].

        Returns:
            Keys and values of all tokens, [1, H, N, head_dim]. Attention that is given these very
            objects (see `owner_of`) reads the cache instead. Once a policy has dropped tokens, or
            there are codes of heads that do not keep as many channels as each other, nothing else
            can: they are then `Withheld`.

        Raises:
            UnsupportedError: a batch above 1.
            DroppedTokensError: nothing attended to the tokens of the call before, although their
                arrays were withheld.
            ShapeError: the arrays do not fit each other or earlier ones.
            ConfigError: policy=budget with bytes that cannot be kept to, or what was learned is
                for another shape.
        """
        return self._handed_out(self.update(keys, values))

    def update(self, keys: mx.array, values: mx.array, ahead: bool = True) -> Fetch:
        """Append tokens as `update_and_fetch` does, for a model whose attention asks the fetch
        itself: what it attends to is all tokens, and no arrays stand for them.

        Args:
            ahead: make the working copy of a prefill at once. Later, it is made when attention
                needs it, and until then the codes of before are held beside the new ones.

        Raises:
            UnsupportedError, DroppedTokensError, ShapeError, ConfigError: see there.
        """
        layer, moves = self.begin_update(keys, values)
        layer.append(mx.squeeze(keys, 0), mx.squeeze(values, 0))  # an index would be a gather
        if keys.shape[2] <= MAX_DECODE_TOKENS:
            return self.appended(layer, keys.shape[2])
        # One layer at a time: a lazy graph of all layers would hold all their working copies.
        rows = layer.rows() if ahead else None
        mx.eval(rows or layer.exact)
        fetch = self.appended(layer, keys.shape[2], rows)
        if self._parts is not None:
            self._parts += 1
        elif moves:
            layer.compress()
        mx.eval(layer.state)
        return fetch

    def begin_update(self, keys: mx.array, values: mx.array) -> tuple[Layer, bool]:
        """What comes before tokens are appended to the layer, which is returned; and whether it is
        to be compressed once they were attended to.

        Raises:
            UnsupportedError, DroppedTokensError, ShapeError, ConfigError: see `update`.
        """
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"[update_and_fetch] expected keys [1, H, L, D] and values [1, H, L, Dv], "
                f"got {keys.shape} and {values.shape}."
            )
        batch, heads, tokens, dim = keys.shape
        if batch != 1:
            raise UnsupportedError(
                f"this compressed cache holds one sequence, got a batch of {batch}; "
                "batch_generate and the server make a cache for several."
            )
        return self.begin(Shape(heads, dim, values.shape[3]), tokens, (keys.dtype, values.dtype))

    def begin(
        self, shape: Shape, tokens: int, dtypes: tuple[mx.Dtype, mx.Dtype]
    ) -> tuple[Layer, bool]:
        """`begin_update` by what is to be known of keys and values: their heads and dims, how many
        tokens, and their dtypes.

        Raises:
            DroppedTokensError, ShapeError, ConfigError: see `update`.
        """
        layer = self._checked(shape, tokens, dtypes)
        self._fetched = self._held = None  # nothing may hold the pool while it is written
        moves = prefill = tokens > MAX_DECODE_TOKENS
        if self._parts:
            pass  # the update has begun
        elif self._sequence.settles:
            moves = not self._sequence.before_update(layer, tokens)
        elif not prefill:
            layer.compress()
        return layer, moves

    def appended(self, layer: Layer, tokens: int, rows: Rows | None = None) -> Fetch:
        """What is to be attended to once so many tokens have been appended to the layer; `rows` is
        its working copy, if there is one."""
        self._unread = self._calls.fused if layer.ragged else -1
        return Fetch(layer, rows, tokens, self._calls, self._sequence)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The arrays of the last `update_and_fetch` while they live, else equal ones.

        Raises:
            UnsupportedError: the cache is empty.
        """
        if self._fetched is not None:
            keys, values = (fetched() for fetched in self._fetched)
            if keys is not None and values is not None:
                return keys, values
        self.view()  # an empty cache has nothing
        assert self._layer is not None
        return self._handed_out(self.appended(self._layer, 0))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask of the next N tokens, as mlx-lm's own caches make it.

        Raises:
            DroppedTokensError: an array is asked for although heads lack tokens, or are stored
                apart.
        """
        if window_size is None and not return_array:
            return None if N == 1 else "causal"
        if window_size is None and N == 1:
            return None
        if self._layer is not None and self._layer.ragged:
            raise DroppedTokensError
        columns = mx.arange(self.offset + N)
        rows = mx.arange(self.offset, self.offset + N)[:, None]
        mask = rows >= columns
        return mask if window_size is None else mask & (rows < columns + window_size)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be removed from the end, and the rest serve another
        prompt that begins with them: until something of a prompt goes once it is in."""
        return self._layer is None or self._layer.settled == 0

    def trim(self, n: int) -> int:
        """Remove the last n tokens (all, if there are fewer); returns how many were removed.

        What a policy has dropped stays dropped, and what a mask left out is left out from there on:
        ask `Sequence.is_prefix` before another prompt goes on.
        Below the window the block that is cut is decoded, and its surviving slots become the
        window; where they cannot be arrays (see `update_and_fetch`) they stay codes, and the window
        is empty. When no body is left the centers are forgotten and fitted anew.
        """
        n = max(0, min(n, self.offset))
        if n == 0 or self._layer is None:
            return n
        self._fetched = self._held = None
        self._unread = -1
        self._layer.trim(n)
        return n

    @property
    def offset(self) -> int:
        """Tokens so far: the position of the next one."""
        return self._layer.offset if self._layer else 0

    def size(self) -> int:
        """Tokens in the cache."""
        return self.offset

    def empty(self) -> bool:
        """True before the first token."""
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.memory().used

    @property
    def state(self) -> CacheState:
        """Everything that `from_state` needs."""
        layer = self._layer.state if self._layer else None
        return CacheState.made(self.config.spec(), self.keep_fetched, layer, self.learned)

    @state.setter
    def state(self, value: Iterable[Any]) -> None:
        if self._layer:
            self._sequence.leave(self._layer)
        self._restore(value)

    @classmethod
    def from_state(cls, state: Iterable[Any]) -> CompressedKVCache:
        """A cache with the content of `state`; a sequence of its own until it joins another."""
        cache = cls.__new__(cls)
        cache._restore(state)
        return cache

    def _restore(self, state: Iterable[Any]) -> None:
        value = CacheState.of(state)
        config = CompressionConfig.parse(value.kv, stored=True)
        learned = value.learned()
        CompressedKVCache.__init__(self, config, value.keep_fetched, learned=learned)
        if value.layer is not None:
            self._begin(Layer.restored(value.layer, self.config, self._backend, learned))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedKVCache:
        """An independent copy that shares the blocks until one of the two changes them."""
        copy = self._copy(deepcopy(self._sequence, memo))  # one for all copies of a list
        memo[id(self)] = copy
        return copy

    def fork(self, which: int = 0) -> CompressedKVCache:
        """Such a copy, of one cache of a list at a time, see `Sequence.fork`."""
        return self._copy(self._sequence.fork(self, which))

    def _copy(self, sequence: Sequence) -> CompressedKVCache:
        copy = CompressedKVCache(
            self.config, self.keep_fetched, self._exact_dtype, sequence, self.learned
        )
        if self._layer:
            copy._begin(self._layer.copy())
        return copy

    # What the rest of the project asks for.

    def begin_parts(self) -> None:
        """Take the next updates, of more than 8 tokens each, as parts of one: nothing is
        compressed before `end_parts`. See `Sequences.one_update`."""
        self._parts = 0

    def end_parts(self) -> None:
        """The update is complete, or goes no further."""
        begun, self._parts = self._parts, None
        if begun and self._layer is not None:
            self._layer.compress()
            mx.eval(self._layer.state)

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def fused_calls(self) -> int:
        """How often attention read the cache itself instead of its decoded arrays."""
        return self._calls.fused

    @property
    def values_read(self) -> float:
        """Share of the stored values that the last decode call read; 1.0 without skip=."""
        if self._calls.reads is None:
            return 1.0
        read, present = np.array(self._calls.reads).sum(axis=0)
        return float(read) / max(1, int(present))

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in an uncompressed fp16 cache."""
        return self._layer.fp16_nbytes if self._layer else 0

    @property
    def sequence(self) -> Sequence:
        """That it is a layer of."""
        return self._sequence

    def join(self, sequence: Sequence) -> None:
        """Be a layer of another sequence from here on.

        Raises:
            ConfigError: it has another policy or scorer.
        """
        if (sequence.policy, sequence.scorer) != (self.config.policy, self.config.scorer):
            raise ConfigError(
                f"a cache with {self.config.policy} and {self.config.scorer} cannot be a layer of "
                f"a sequence with {sequence.policy} and {sequence.scorer}; use the same for both."
            )
        if self._layer:
            self._sequence.leave(self._layer)
            sequence.join(self._layer)
        self._sequence = sequence

    @property
    def layer(self) -> Layer | None:
        """What is stored; None before the first token."""
        return self._layer

    def memory(self) -> CacheMemory:
        """Bytes of this layer, counted from its buffers."""
        return self._layer.memory() if self._layer else CacheMemory()

    def view(self) -> View:
        """This layer as kernels see it.

        Raises:
            UnsupportedError: the cache is empty.
        """
        if self._layer is None or self.empty():
            raise UnsupportedError("an empty cache has no tokens to attend to.")
        return self._layer.view()

    def _begin(self, layer: Layer) -> None:
        self._sequence.join(layer)
        self._layer = layer

    def _checked(self, shape: Shape, tokens: int, dtypes: tuple[mx.Dtype, mx.Dtype]) -> Layer:
        """The layer that takes them."""
        if tokens == 0:
            raise ShapeError("[update_and_fetch] expected at least one token, got 0.")
        if self._layer is None:
            k, v = (self._exact_dtype or dtype for dtype in dtypes)
            self._begin(Layer(shape, self.config, self._backend, (k, v), self.learned))
        assert self._layer is not None
        if shape != self._layer.shape:
            raise ShapeError(f"[update_and_fetch] expected {self._layer.shape}, got {shape}.")
        if self._unread == self._calls.fused:
            raise DroppedTokensError("reads keys and values itself")
        return self._layer

    def _handed_out(self, fetch: Fetch) -> Arrays:
        keys, values = fetch.arrays()
        self._fetched = weakref.ref(keys), weakref.ref(values)
        if self.keep_fetched:
            self._held = keys, values
        return keys, values
