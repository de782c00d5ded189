"""The queries that came before there was a body: what the equalizer is fitted on."""

from __future__ import annotations

import mlx.core as mx

_CALLS = 32  # whose queries are remembered, at most


class SeenQueries:
    """The size of their channels, call by call."""

    def __init__(self) -> None:
        self._squares: list[tuple[mx.array, int]] = []  # sums of how many

    def add(self, queries: mx.array) -> None:
        """Those of a call, [H, n, head_dim]."""
        squares = queries.astype(mx.float32).square().sum(axis=1)
        self._squares = [*self._squares[1 - _CALLS :], (squares, queries.shape[1])]

    def mean_squares(self) -> mx.array | None:
        """Of each channel, float32 [H, head_dim]; None if there were none."""
        if not self._squares:
            return None
        total = mx.stack([squares for squares, _ in self._squares]).sum(axis=0)
        return total / sum(count for _, count in self._squares)

    def copy(self) -> SeenQueries:
        """The same for another layer."""
        other = SeenQueries()
        other._squares = self._squares  # replaced, never changed
        return other
