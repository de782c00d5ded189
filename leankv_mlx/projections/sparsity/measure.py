"""What a model's inputs are like, seen while it reads text: each class is one way to look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from leankv_mlx.projections.inputs import Input
from leankv_mlx.projections.project import project
from leankv_mlx.projections.sparsity.allocation import LEVELS, Floats
from leankv_mlx.projections.sparsity.histogram import Histogram
from leankv_mlx.projections.types import Keep
from leankv_mlx.projections.weight import Weight

_ROWS = 64  # of a call that output errors are measured on
_COLUMNS = 256  # of the weights whose norms are computed at a time


class Seen:
    """Which inputs there are, and the weights behind each."""

    watching = False

    def __init__(self) -> None:
        self.weights: defaultdict[Input, dict[int, Weight]] = defaultdict(dict)

    def keep(self, at: Input, rows: int) -> Keep | None:
        """All channels."""
        return None

    def saw(self, at: Input, x: mx.array, weights: Sequence[Weight], read: mx.array | None) -> None:
        """See `Inputs`."""
        self.weights[at] |= {id(weight): weight for weight in weights}

    def channels(self) -> dict[Input, int]:
        """How many each input has."""
        return {at: next(iter(all_.values())).inputs for at, all_ in self.weights.items()}

    def sizes(self) -> Floats:
        """Bytes of the weights behind each input, in the order of `weights`."""
        return np.array(
            [sum(w.nbytes for w in all_.values()) for all_ in self.weights.values()], float
        )

    def norms(self) -> dict[Input, mx.array]:
        """Of the columns of all weights behind each input, float32 [K]."""
        return {at: _norms([*weights.values()]) for at, weights in self.weights.items()}


class Sizes(Seen):
    """Histograms of what decides whether a channel takes part: |x|, or |x| times norms.

    Args:
        seen: the inputs. Where an input comes once for each of its weights, the first one counts.
        norms: see `Seen.norms`; empty for none.
    """

    watching = True

    def __init__(self, seen: Seen, norms: Mapping[Input, mx.array]) -> None:
        super().__init__()
        self.histograms = {at: Histogram() for at in seen.weights}
        self._first = {at: next(iter(weights)) for at, weights in seen.weights.items()}
        self._norms = norms

    def saw(self, at: Input, x: mx.array, weights: Sequence[Weight], read: mx.array | None) -> None:
        """See `Inputs`."""
        if id(weights[0]) == self._first.get(at):
            self.histograms[at].add(np.array(_size(x, self._norms.get(at))))


class Errors(Seen):
    """How far outputs are off when channels are left out, squared and summed.

    Args:
        thresholds: of each input at `LEVELS`.
        norms: see `Seen.norms`; empty for none.
    """

    watching = True

    def __init__(self, thresholds: Mapping[Input, Floats], norms: Mapping[Input, mx.array]) -> None:
        super().__init__()
        self._thresholds = thresholds
        self._norms = norms
        self._errors = {at: np.zeros(len(LEVELS)) for at in thresholds}
        self._whole = dict.fromkeys(thresholds, 0.0)

    def saw(self, at: Input, x: mx.array, weights: Sequence[Weight], read: mx.array | None) -> None:
        """See `Inputs`."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[:: -(-len(rows) // _ROWS)].astype(mx.float32)
        size = _size(rows, self._norms.get(at))
        limits = mx.array(self._thresholds[at][1:].astype(np.float32))
        left_out = mx.where(size <= limits[:, None, None], rows, 0)
        outs = project(mx.concatenate([rows[None], left_out]), weights).outs
        squares = np.array(sum(mx.square(out).sum(axis=(1, 2)) for out in outs), float)
        self._whole[at] += squares[0]
        self._errors[at][1:] += squares[1:]

    def relative(self) -> Floats:
        """[inputs, len(LEVELS)]: of the outputs' own squares."""
        found = [e / max(self._whole[at], 1e-30) for at, e in self._errors.items()]
        return np.array(found)


class Only:
    """Leaves out channels of one input, in calls of any size."""

    watching = False

    def __init__(self, at: Input, keep: Keep) -> None:
        self._at, self._keep = at, keep

    def keep(self, at: Input, rows: int) -> Keep | None:
        """See `Inputs`."""
        return self._keep if at == self._at else None

    def saw(self, at: Input, x: mx.array, weights: Sequence[Weight], read: mx.array | None) -> None:
        """Nothing is counted."""


def _size(x: mx.array, norms: mx.array | None) -> mx.array:
    size = mx.abs(x.astype(mx.float32))
    return size if norms is None else size * norms


def _norms(weights: Sequence[Weight]) -> mx.array:
    """What the weights make of the unit vectors, some at a time."""
    channels = weights[0].inputs
    parts = []
    for begin in range(0, channels, _COLUMNS):
        units = mx.eye(min(_COLUMNS, channels - begin), channels, begin)
        outs = project(units, weights).outs
        parts.append(mx.linalg.norm(mx.concatenate(outs, axis=1), axis=1))
        mx.eval(parts[-1])
    return mx.concatenate(parts)
