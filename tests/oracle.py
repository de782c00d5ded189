"""The codec and the cache's rules once more, in NumPy and from the specification alone.

Only the sign vector is taken from the package: it is data, pinned by a digest in the codec tests.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import signs

Array = NDArray[Any]

CUBIC = {
    2: (0.8914833, 0.04896949),
    3: (0.4720540, 0.01151046),
    4: (0.2401280, 0.002102614),
    8: (0.015811765, 1.0537124e-6),
}


def hadamard_matrix(n: int) -> Array:
    """Sylvester's matrix, [n, n] of +-1."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def rotation(head_dim: int) -> Array:
    """float64 [padded head_dim, head_dim]: row vectors are rotated by x @ R.T."""
    dim = -(-head_dim // 32) * 32
    block = dim & -dim
    h = np.kron(np.eye(dim // block), hadamard_matrix(block) / np.sqrt(block))
    return (h * signs(dim).astype(np.float64))[:, :head_dim]


def levels(bits: int) -> Array:
    """Levels of a codebook."""
    a, b = CUBIC[bits]
    x = np.arange(2**bits) - (2**bits - 1) / 2
    return x * (a + b * x * x)


def nearest(x: Array, bits: int) -> Array:
    """Codes of the nearest levels."""
    middle = (levels(bits)[1:] + levels(bits)[:-1]) / 2
    return np.searchsorted(middle, x)


def encode(x: Array, bits: int) -> tuple[Array, Array]:
    """Scale search with least squares on vectors [..., D]: codes, and the fp16 scales that keep the
    product of a vector with itself."""
    rms = np.sqrt((x**2).mean(-1))
    best, best_gain = rms, np.full(rms.shape, -1.0)
    for factor in np.linspace(0.8, 1.2, 11):
        fitted = levels(bits)[nearest(x / np.maximum(factor * rms, 1e-30)[..., None], bits)]
        dot, norm = (x * fitted).sum(-1), (fitted**2).sum(-1)
        better = dot**2 / norm > best_gain
        best, best_gain = np.where(better, dot / norm, best), np.maximum(best_gain, dot**2 / norm)
    fitted = best.astype(np.float16).astype(np.float64)
    codes = nearest(x / np.maximum(fitted, 1e-30)[..., None], bits)
    dot = (x * levels(bits)[codes]).sum(-1)
    scale = np.where(dot > 0, (x**2).sum(-1) / np.where(dot > 0, dot, 1), fitted)
    return codes, scale.astype(np.float16)


def decode(codes: Array, scale: Array, bits: int) -> Array:
    """Codes [..., D] and scales [...] -> vectors."""
    return levels(bits)[codes] * scale.astype(np.float64)[..., None]


def unpack(blocks: Array, format: Format) -> tuple[list[Array], list[Array]]:
    """uint32 [..., words] -> ([K codes, V codes], [K scales, V scales]), bit by bit.

    Codes are [..., 32, dim], scales fp16 [..., 32].
    """
    bases = np.cumsum([0, *(32 * b for b in (*format.k_bits, *format.v_bits))])
    sides = []
    for first, bits, transposed in (
        (0, format.k_bits, False),
        (len(format.k_bits), format.v_bits, True),
    ):
        codes = np.zeros((*blocks.shape[:-1], 32, 32 * len(bits)), np.int64)
        for c, b in enumerate(bits):
            tile = blocks[..., bases[first + c] :].astype(np.int64)
            for lane in range(32):
                for i in range(32):
                    code = _code(tile, b, lane, i)
                    slot, channel = (i, lane) if transposed else (lane, i)
                    codes[..., slot, 32 * c + channel] = code
        sides.append(codes)
    words = blocks[..., -32:]
    halves = [(words & 0xFFFF).astype(np.uint16), (words >> 16).astype(np.uint16)]
    return sides, [half.view(np.float16) for half in halves]


def _code(tile: Array, bits: int, lane: int, i: int) -> Array:
    if bits == 0:
        return np.zeros(tile.shape[:-1], np.int64)
    field = 2 if bits == 3 else bits
    per = 32 // field
    code = (tile[..., (i // per) * 32 + lane] >> (field * (i % per))) & (2**field - 1)
    if bits == 3:
        position = 8 * ((i & 15) >> 2) + 4 * (i >> 4) + (i & 3)
        code = code | (((tile[..., 64 + lane] >> position) & 1) << 2)
    return code


class OracleCache:
    """An uncompressed cache that hands out the NumPy round trip of what ours compresses.

    `real` is the compressed cache that has seen (at least) the same tokens. Where its codes differ
    from the oracle's (ties decided by the last bit of a float) its own are used; `ties` is the
    largest share of such codes. The scales of its key channels are taken over too.
    """

    def __init__(self, real: CompressedKVCache) -> None:
        self.real, self.config = real, real.config
        self.offset = 0
        self.body = 0
        self.compared, self.ties = 0, 0.0
        self._rows: list[Array] = []  # float64 [H, N, D]; body rows are the decoded ones
        self._centers: list[Array] = []
        self._divisors: list[Array] = []  # of the channels of keys and of values, [H, 1, D]
        self._prefilled = False  # what a prefill compresses waits: attention is still to come

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        new = keys.shape[2]
        if new <= 8 or self._prefilled:
            self._compress()
        rows = [np.array(x[0].astype(mx.float32), np.float64) for x in (keys, values)]
        old = self._rows or [x[:, :0] for x in rows]
        self._rows = [np.concatenate(pair, axis=1) for pair in zip(old, rows, strict=True)]
        self.offset += new
        k, v = (mx.array(x.astype(np.float32)[None]) for x in self._rows)
        self._last = k.astype(keys.dtype), v.astype(values.dtype)
        self._prefilled = new > 8
        return self._last

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self._last

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        from mlx_lm.models.cache import create_attention_mask

        return create_attention_mask(*args, offset=self.offset, **kwargs)

    def trim(self, n: int) -> int:
        """To be called before the real cache is trimmed."""
        if self._prefilled:
            self._compress()
            self._prefilled = False
        self.offset -= n
        self._rows = [x[:, : self.offset] for x in self._rows]
        left = max(0, self.offset - self.config.sink_tokens)
        self.body = min(self.body, left // 32 * 32)
        return n

    def size(self) -> int:
        return self.offset

    def is_trimmable(self) -> bool:
        return True

    @property
    def state(self) -> list[Any]:
        return []

    def _compress(self) -> None:
        sinks = min(self.config.sink_tokens, self.offset)
        blocks = (self.offset - sinks - self.body - self.config.window) // 32
        if blocks < 1:
            return
        start = sinks + self.body
        moved = [x[:, start : start + 32 * blocks] for x in self._rows]
        if not self.body:
            equalizer = self.real.layer and self.real.layer.space.equalizer
            of_keys = np.array(equalizer.scales, np.float64)[:, None] if equalizer else np.ones(1)
            self._divisors = [of_keys, np.ones(1)]
            self._centers = [
                (x[:, :512] / divisor).mean(axis=1) @ rotation(x.shape[2]).T
                for x, divisor in zip(moved, self._divisors, strict=True)
            ]
        for side, rows in enumerate(moved):
            self._rows[side][:, start : start + 32 * blocks] = self._round_trip(rows, side)
        self.body += 32 * blocks

    def _round_trip(self, rows: Array, side: int) -> Array:
        bits = (self.config.k_bits, self.config.v_bits)[side]
        assert isinstance(bits, int)
        r, center = rotation(rows.shape[2]), self._centers[side][:, None]
        codes, _ = encode(rows / self._divisors[side] @ r.T - center, bits)
        body = self.real.view().tiers[0]
        first = self.body // 32
        table = np.array(body.table)[:, first : first + rows.shape[1] // 32]
        both_codes, both_scales = unpack(np.array(body.pool)[table], body.format)
        real = both_codes[side].reshape(codes.shape)
        self.ties = max(self.ties, float((real != codes).mean()))
        self.compared += codes.size
        rows = (decode(real, both_scales[side].reshape(codes.shape[:2]), bits) + center) @ r
        return rows * self._divisors[side]
