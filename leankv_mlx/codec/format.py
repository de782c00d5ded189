"""What a block stores: bits per group of 32 channels, for keys and for values."""

from collections.abc import Iterator
from dataclasses import dataclass

from leankv_mlx.errors import ConfigError

TILE = 32
"""Channels in a group, slots in a block, lanes of a tile."""


def padded(head_dim: int) -> int:
    """The head_dim as stored: the next multiple of 32."""
    return -(-head_dim // TILE) * TILE


@dataclass(frozen=True, slots=True)
class Format:
    """Bits of each channel group, in channel order; 0 stores nothing of that group. And what the
    codes mean: the name of a codec in `codec.codecs`.

    A block of this format is `words` uint32: the key tiles, the value tiles, one row of scales.
    """

    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    codec: str = "cubic"

    @classmethod
    def of(
        cls,
        k_bits: int | tuple[int, ...],
        v_bits: int | tuple[int, ...],
        k_dim: int,
        v_dim: int,
    ) -> "Format":
        """The format of a layer whose heads have `k_dim` key and `v_dim` value channels.

        Raises:
            ConfigError: bits are given per group and their number does not fit the head_dim.
        """
        return cls(_per_group("k", k_bits, k_dim), _per_group("v", v_bits, v_dim))

    @property
    def k_dim(self) -> int:
        """Stored key channels, a multiple of 32."""
        return TILE * len(self.k_bits)

    @property
    def v_dim(self) -> int:
        """Stored value channels, a multiple of 32."""
        return TILE * len(self.v_bits)

    @property
    def words(self) -> int:
        """uint32 words of a block."""
        return TILE * (sum(self.k_bits) + sum(self.v_bits) + 1)


def runs(bits: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring groups of equal bits: (bits, first group, groups)."""
    start = 0
    for i in range(1, len(bits) + 1):
        if i == len(bits) or bits[i] != bits[start]:
            yield bits[start], start, i - start
            start = i


def _per_group(side: str, bits: int | tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    groups = padded(head_dim) // TILE
    if isinstance(bits, int):
        return (bits,) * groups
    if len(bits) != groups:
        raise ConfigError(
            f"{side}_bits has {len(bits)} channel groups, but head_dim {head_dim} has {groups}; "
            "give one number per 32 channels, or one for all."
        )
    return bits
