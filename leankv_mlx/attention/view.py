"""A compressed sequence as attention sees it."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from leankv_mlx.kernels import Backend, Body, Centers, Rotations, Rows
from leankv_mlx.kernels.gather import gather


@dataclass(frozen=True)
class View:
    """One layer's tokens in order: sink tokens, bodies, window.

    Attributes:
        bodies: the compressed tokens, one entry for each tier; may be empty.
        exact: rotated uncompressed rows [H, E, D], the sink tokens first, then the window.
        centers: of the bodies; None while there is no body.
        sinks: how many of the exact rows are sink tokens.
        rotations: the space that everything here lives in.
        backend: who computes.
        dtype: of the decoded rows.
        skip: attention weight below which values may be left out in decode.
    """

    bodies: Sequence[Body]
    exact: Rows
    centers: Centers | None
    sinks: int
    rotations: Rotations
    backend: Backend
    dtype: mx.Dtype
    skip: float = 0.0

    def present(self) -> mx.array | None:
        """Which of the rows that `rows` gives are tokens, bool [H, N]; None if all are."""
        if all(body.full for body in self.bodies):
            return None
        heads, exact = self.exact.k.shape[:2]
        parts = [mx.arange(body.slots) < body.lengths[:, None] for body in self.bodies]
        before = mx.ones((heads, self.sinks), mx.bool_)
        behind = mx.ones((heads, exact - self.sinks), mx.bool_)
        return mx.concatenate([before, *parts, behind], axis=1)

    def rows(self) -> Rows:
        """All tokens, decoded, in order and still rotated: [H, N, Dk] and [H, N, Dv].

        This is the working copy of a prefill: a full-size copy of one layer, to be dropped as soon
        as its attention is done.
        """
        return self._gather(None)

    def fetched(self) -> Rows:
        """All tokens as the model made them, keys and values [1, H, N, head_dim]."""
        rows = self._gather(self.rotations)
        return Rows(rows.k[None], rows.v[None])

    def unrotated(self, rows: Rows) -> Rows:
        """The same from what `rows` gave."""
        k, v = (r.undo(x)[None] for r, x in zip(self.rotations, rows, strict=True))
        return Rows(k, v)

    def _gather(self, rotations: Rotations | None) -> Rows:
        return gather(
            self.bodies,
            self.exact,
            self.centers,
            sinks=self.sinks,
            dtype=self.dtype,
            rotations=rotations,
            backend=self.backend,
        )
