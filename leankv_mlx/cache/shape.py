"""What every token of a layer is."""

from __future__ import annotations

from dataclasses import dataclass

from leankv_mlx.codec.channels import Channels
from leankv_mlx.errors import ConfigError
from leankv_mlx.settings import Mask


@dataclass(frozen=True)
class Shape:
    """KV heads and head dims."""

    heads: int
    k_dim: int
    v_dim: int

    def check(self, channels: Channels, mask: Mask) -> None:
        """Whether channels of a mask are those of such a layer.

        Raises:
            ConfigError: they are not.
        """
        if (channels.heads, channels.head_dim) != (self.heads, self.k_dim):
            raise ConfigError(
                f"mask={mask} is for {channels.heads} heads of {channels.head_dim} key channels, "
                f"but this layer has {self.heads} of {self.k_dim}; learn one for this model "
                "(leankv learn masks)."
            )
