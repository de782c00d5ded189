"""Leaving out input channels while a model decodes, and counting what it read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from leankv_mlx.kernels import MAX_DECODE_TOKENS
from leankv_mlx.projections.inputs import Input
from leankv_mlx.projections.types import Keep
from leankv_mlx.projections.weight import Weight


class _Call(NamedTuple):
    """A product.

    Attributes:
        first: identity of the first weight; the weights themselves may go.
        nbytes: of all weights.
        channels: of the inputs, rows times K.
        read: how many of them took part; None for all.
    """

    first: int
    nbytes: int
    channels: int
    read: mx.array | None


class Sparsity:
    """What an attached model does with its `Inputs`: calls of few rows leave out channels.

    A prompt is read with all of them: its rows share one reading of the weights, so there is little
    to win.

    Args:
        keeps: which channels of an input take part; inputs that are not in it keep all.
    """

    watching = False

    def __init__(self, keeps: Mapping[Input, Keep]) -> None:
        self._keeps = keeps
        self._resting = 0
        self._calls: dict[Input, list[_Call]] = {}
        self._at: Input | None = None

    def keep(self, at: Input, rows: int) -> Keep | None:
        """See `Inputs`."""
        return None if rows > MAX_DECODE_TOKENS or self._resting else self._keeps.get(at)

    def saw(self, at: Input, x: mx.array, weights: Sequence[Weight], read: mx.array | None) -> None:
        """See `Inputs`."""
        first = id(weights[0])
        calls = self._calls.get(at, [])
        if at != self._at or any(call.first == first for call in calls):
            calls = self._calls[at] = []  # the first of a step
            self._at = at
        calls.append(_Call(first, sum(weight.nbytes for weight in weights), x.size, read))

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is left out inside of the block, however few rows a call has."""
        self._resting += 1
        try:
            yield
        finally:
            self._resting -= 1

    @property
    def weights_read(self) -> float:
        """Share of the bytes of all weights behind inputs that the last step read; 1.0 before the
        first. Native products count while they compute, so nobody waits for it."""
        total, read = 0, 0.0
        for calls in self._calls.values():
            for _, nbytes, channels, count in calls:
                total += nbytes
                read += nbytes if count is None else nbytes * float(np.array(count)) / channels
        return read / total if total else 1.0
