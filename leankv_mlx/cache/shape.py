"""What every token of a layer is."""

from __future__ import annotations

from dataclasses import dataclass

from leankv_mlx.codec.space import Learned
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """KV heads and head dims."""

    heads: int
    k_dim: int
    v_dim: int

    def check(self, learned: Learned, config: CompressionConfig) -> None:
        """Whether a mask or a basis is for such a layer.

        Raises:
            ConfigError: it is not.
        """
        if (learned.heads, learned.head_dim) != (self.heads, self.k_dim):
            name = f"mask={config.mask}" if config.mask else f"basis={config.basis}"
            raise ConfigError(
                f"{name} is for {learned.heads} heads of {learned.head_dim} key channels, "
                f"but this layer has {self.heads} of {self.k_dim}; learn one for this model "
                "(leankv learn)."
            )
