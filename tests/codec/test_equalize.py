"""Equalization: exact in the scores, by the sizes of keys and queries."""

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


def queries(heads: int = H) -> mx.array:
    """[1, heads, 7, D], some pairs of channels larger than others."""
    return mx.random.normal((1, heads, 7, D), key=mx.random.key(1)) * mx.exp(
        mx.arange(D) % 32 % 7 - 3.0
    )


def squares(q: mx.array) -> mx.array:
    return q.reshape(H, -1, D).square().mean(axis=1)


def cost(k: mx.array, q: mx.array) -> float:
    """What an error that is spread over all channels does to the scores."""
    return float((k.var(axis=1).sum(-1) * squares(q).sum(-1)).mean())


def test_queries_tell_which_channels_matter() -> None:
    k, q = keys(outlier=50.0), queries()
    found = Equalizer.fit(k, squares(q))
    best = float(((mx.sqrt(k.var(axis=1)) * mx.sqrt(squares(q))).sum(-1) ** 2).mean())
    assert cost(found.apply(k), found.queries(q)) == pytest.approx(best, rel=0.1)
    assert best < 0.2 * cost(k, q)


def test_scaled_channels_of_keys_and_queries_change_nothing() -> None:
    """An outlier pair of keys that the queries make up for is met exactly."""
    k, q = keys(), queries()
    factor = mx.where(mx.arange(D) % 32 == 9, 20.0, 1.0)
    plain = Equalizer.fit(k, squares(q)).apply(k)
    other = Equalizer.fit(k * factor, squares(q / factor)).apply(k * factor)
    ratio = other / plain
    assert mx.allclose(ratio, ratio[:, :1, :1], rtol=1e-3)


def test_both_channels_of_a_pair_are_scaled_alike() -> None:
    """RoPE moves what one of them holds to the other, further on in the text."""
    k, q = keys(mean=20.0), queries()
    scales = np.array(Equalizer.fit(k, squares(q)).scales)
    np.testing.assert_array_equal(scales[:, :32], scales[:, 32:])
    moved = np.array(
        Equalizer.fit(mx.roll(k, 32, axis=-1), squares(mx.roll(q, 32, axis=-1))).scales
    )
    np.testing.assert_allclose(moved, scales, rtol=1e-5)
    plain = np.array(Equalizer.fit(keys(), squares(q)).scales)
    assert (scales[:, 3] / scales[:, 4] > 2 * plain[:, 3] / plain[:, 4]).all()  # its mean counts


@pytest.mark.parametrize("dead", ["keys", "queries", "both"])
def test_channels_without_size_are_harmless(dead: str) -> None:
    k, q = keys(), queries()
    alive = mx.where(mx.arange(D) % 32 < 8, 0.0, 1.0)
    k, q = (k if dead == "queries" else k * alive), (q if dead == "keys" else q * alive)
    found = Equalizer.fit(k, squares(q))
    assert mx.isfinite(found.scales).all() and (found.scales > 0).all()
    assert mx.allclose(found.undo(found.apply(k)), k, rtol=1e-5)
    nothing = Equalizer.fit(mx.zeros_like(k), mx.zeros((H, D)))
    assert mx.allclose(nothing.scales, mx.ones((H, D)), rtol=1e-5)


@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("query_heads", [2, 6])
def test_scores_do_not_change(query_heads: int, with_queries: bool) -> None:
    k = keys(outlier=30.0)
    q = queries(query_heads)
    found = Equalizer.fit(k, squares(q) if with_queries else None)
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
