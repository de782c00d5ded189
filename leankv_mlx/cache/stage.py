"""What MLX's pipelines find at a cache: a model whose layers are on several machines."""

from __future__ import annotations

import mlx.core as mx


class Stage:
    """The last cache of a machine, to which its model ties the sending of what it computed.

    mlx-lm's models do so by `cache.keys = mx.depends(cache.keys, sent)`, because reading a prompt
    evaluates nothing but caches.
    """

    @property
    def keys(self) -> mx.array:
        """Nothing that is stored: something to be tied to."""
        return mx.array(0)

    @keys.setter
    def keys(self, tied: mx.array) -> None:
        """Send it now; the next machine can then begin while this one goes on."""
        mx.async_eval(tied)
