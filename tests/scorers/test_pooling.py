"""A score is the largest among neighbours."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from leankv_mlx.scorers.pooling import pooled


def test_pooling_reaches_neighbours_by_position() -> None:
    scores = np.array([[0.0, 0.9, 0.0, 0.2, 0.0, 7.0]], np.float32)
    positions = np.array([[10, 12, 3, 4, 30, -1]], np.int32)
    assert pooled(scores, positions, 5).tolist() == [pytest.approx([0.9, 0.9, 0.2, 0.2, 0.0, 0.0])]
    assert pooled(scores, positions, 3)[0].tolist() == pytest.approx([0.0, 0.9, 0.2, 0.2, 0, 0])
    assert pooled(scores, positions, 1)[0].tolist() == pytest.approx([0, 0.9, 0, 0.2, 0, 0])
    far = np.array([[0, 1, 900, 902, 903, 5000]], np.int32)
    scores = np.array([[0.1, 0.2, 0.9, 0.3, 0.4, 0.5]], np.float32)
    assert pooled(scores, far, 5)[0].tolist() == pytest.approx([0.2, 0.2, 0.9, 0.9, 0.4, 0.5])
    wide = np.random.default_rng(0).random((3, 200)).astype(np.float32)
    at = np.broadcast_to(np.arange(200, dtype=np.int32), (3, 200))
    expected = np.stack([wide[:, max(0, i - 7) : i + 8].max(axis=1) for i in range(200)], axis=1)
    np.testing.assert_array_equal(pooled(wide, at, 15), expected)


def test_pooling_a_few_tokens_late_in_a_long_context_takes_little_memory() -> None:
    positions = np.tile(np.r_[0:4, (1 << 22) : (1 << 22) + 96].astype(np.int32), (64, 1))
    tracemalloc.start()
    try:
        found = pooled(np.ones(positions.shape, np.float32), positions, 31)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert (found == 1).all()
