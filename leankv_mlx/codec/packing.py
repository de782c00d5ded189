"""Codes <-> the uint32 words of a block.

A block is 32 slots of one head in one format: C = k_dim / 32 key tiles, the value tiles, and one
row of scales. A tile is 32 x 32 codes; at B bits it is B rows of 32 words, word j of lane l at
`j * 32 + l`, and each lane owns 32 codes i = 0..31:
- key tile of channel group c: lane = slot, i = channel of the group;
- value tile of channel group c: lane = channel of the group, i = slot.

B in {2, 4, 8} is a field of B bits: row i div (32/B), shift B * (i mod 32/B). B = 3 is a 2-bit
field in rows 0 and 1 and a row 2 of high bits, at bit 8*((i&15)>>2) + 4*(i>>4) + (i&3), so that
four codes can be decoded as a quad of bytes. Scales: slot l's word has the fp16 scale of the key
in its low half and that of the value in its high half.
"""

import mlx.core as mx
import numpy as np

from leankv_mlx.codec.format import TILE, Format, runs

_HIGH_BIT = np.array([8 * ((i & 15) >> 2) + 4 * (i >> 4) + (i & 3) for i in range(32)], np.uint32)


def pack(codes: mx.array, bits: int) -> mx.array:
    """codes: uint32 [..., 32 lanes, 32] -> words uint32 [..., bits, 32 lanes]."""
    if bits == 3:
        high = ((codes >> 2) << mx.array(_HIGH_BIT)).sum(-1)[..., None, :]
        return mx.concatenate([_pack_field(codes & 3, 2), high], axis=-2)
    return _pack_field(codes, bits)


def unpack(words: mx.array, bits: int) -> mx.array:
    """words: uint32 [..., bits, 32 lanes] -> codes uint32 [..., 32 lanes, 32]."""
    if bits == 3:
        high = (words[..., 2, :, None] >> mx.array(_HIGH_BIT)) & 1
        return _unpack_field(words[..., :2, :], 2) | (high << 2)
    return _unpack_field(words, bits)


def _pack_field(codes: mx.array, bits: int) -> mx.array:
    rows = codes.reshape(*codes.shape[:-1], bits, TILE // bits)
    # The fields do not overlap, so their sum is their union.
    words: mx.array = (rows << _shifts(bits)).sum(-1)
    return words.swapaxes(-1, -2)


def _unpack_field(words: mx.array, bits: int) -> mx.array:
    fields = (words.swapaxes(-1, -2)[..., None] >> _shifts(bits)) & (2**bits - 1)
    return mx.flatten(fields, -2)


def _shifts(bits: int) -> mx.array:
    return mx.arange(0, 32, bits, dtype=mx.uint32)


def pack_blocks(
    k: tuple[mx.array, mx.array], v: tuple[mx.array, mx.array], format: Format
) -> mx.array:
    """(codes uint32 [..., 32, dim], scales fp16 [..., 32]) of K and of V -> uint32 [..., words]."""
    (k_codes, k_scales), (v_codes, v_scales) = k, v
    scales = mx.stack([k_scales, v_scales], axis=-1).view(mx.uint32)
    parts = [
        *_pack_side(k_codes, format.k_bits, transposed=False),
        *_pack_side(v_codes, format.v_bits, transposed=True),
        scales.squeeze(-1),
    ]
    return mx.concatenate(parts, axis=-1)


def unpack_k(words: mx.array, format: Format) -> tuple[mx.array, mx.array]:
    """words: uint32 [..., words] -> key codes uint32 [..., 32, k_dim] and scales fp16 [..., 32]."""
    codes = _unpack_side(words, 0, format.k_bits, transposed=False)
    return codes, _scales(words)[..., 0]


def unpack_v(words: mx.array, format: Format) -> tuple[mx.array, mx.array]:
    """The same for values: codes [..., 32, v_dim] and scales [..., 32]."""
    codes = _unpack_side(words, TILE * sum(format.k_bits), format.v_bits, transposed=True)
    return codes, _scales(words)[..., 1]


def _scales(words: mx.array) -> mx.array:
    return words[..., -TILE:, None].view(mx.float16)


def _pack_side(codes: mx.array, bits: tuple[int, ...], transposed: bool) -> list[mx.array]:
    """One array [..., words] for every run of equal bits."""
    parts = []
    for b, first, groups in runs(bits):
        if not b:
            continue
        part = codes[..., TILE * first : TILE * (first + groups)]
        tiles = part.reshape(*part.shape[:-1], groups, TILE).swapaxes(-2, -3)  # [.., C, slot, chan]
        if transposed:
            tiles = tiles.swapaxes(-1, -2)
        parts.append(pack(tiles, b).flatten(-3))
    return parts


def _unpack_side(words: mx.array, start: int, bits: tuple[int, ...], transposed: bool) -> mx.array:
    parts = []
    for b, _, groups in runs(bits):
        shape = (*words.shape[:-1], TILE, TILE * groups)
        if not b:
            parts.append(mx.zeros(shape, mx.uint32))
            continue
        size = TILE * b * groups
        tiles = unpack(
            words[..., start : start + size].reshape(*words.shape[:-1], groups, b, TILE),
            b,
        )
        if transposed:
            tiles = tiles.swapaxes(-1, -2)
        parts.append(tiles.swapaxes(-2, -3).reshape(shape))
        start += size
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
