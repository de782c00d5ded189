"""Equalization: exact in the scores, and only for outliers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.equalize import LIMIT, Equalizer

H, T, D = 2, 200, 64


def keys(outlier: float = 1.0, mean: float = 0.0) -> mx.array:
    k = mx.random.normal((H, T, D), key=mx.random.key(0))
    factor = mx.where(mx.arange(D) % 32 == 5, outlier, 1.0)
    return k * factor + mean * (mx.arange(D) == 3)


def test_ordinary_channels_stay_as_they_are() -> None:
    assert mx.array_equal(Equalizer.fit(keys()).scales, mx.ones((H, D)))


def test_a_large_mean_is_no_outlier() -> None:
    """Centers take the mean away."""
    assert mx.array_equal(Equalizer.fit(keys(mean=100.0)).scales, mx.ones((H, D)))


def test_outliers_are_brought_down_to_the_limit() -> None:
    k = keys(outlier=50.0)
    found = Equalizer.fit(k)
    assert ((np.array(found.scales) > 1) == (np.arange(D) % 32 == 5)).all()
    size = mx.sqrt(found.apply(k).var(axis=1))
    outliers = np.array(size)[:, [5, 37]]
    assert outliers == pytest.approx(LIMIT * np.median(np.array(size)), rel=0.1)


@pytest.mark.parametrize("query_heads", [2, 6])
def test_scores_do_not_change(query_heads: int) -> None:
    k = keys(outlier=30.0)
    q = mx.random.normal((1, query_heads, 7, D), key=mx.random.key(1))
    found = Equalizer.fit(k)
    wide = mx.repeat(k, query_heads // H, axis=0)
    before = q[0] @ wide.swapaxes(1, 2)
    equal = mx.repeat(found.apply(k), query_heads // H, axis=0)
    after = found.queries(q)[0] @ equal.swapaxes(1, 2)
    assert mx.allclose(before, after, rtol=1e-4, atol=1e-3)
    assert mx.allclose(found.undo(found.apply(k)), k, rtol=1e-5)


def test_channels_without_content_are_harmless() -> None:
    found = Equalizer.fit(mx.zeros((H, T, D)))
    assert mx.array_equal(found.scales, mx.ones((H, D)))


def test_the_dtype_is_kept() -> None:
    k = keys(outlier=9.0).astype(mx.bfloat16)
    found = Equalizer.fit(k)
    assert found.apply(k).dtype == found.undo(k).dtype == mx.bfloat16
    assert found.queries(k[None]).dtype == mx.bfloat16
    assert found.scales.dtype == mx.float32
