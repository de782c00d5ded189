"""rotation, center and equalize: every combination is exact but for the codes."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError
from leankv_mlx.mlx_lm import attach, make_caches
from tests.cache.harness import PROMPT, STEPS, chunks, feed, relative, tokens
from tests.models import TINY

SWITCHES = ["rotation=none", "center=off", "equalize=off", "rotation=none,center=off,equalize=off"]
H, D = 2, 64


def rows(n: int, seed: int = 0, outlier: float = 40.0) -> tuple[mx.array, mx.array]:
    k, v = mx.random.normal((2, 1, H, n, D), key=mx.random.key(seed))
    return k * mx.where(mx.arange(D) == 7, outlier, 1.0), v


def filled(kv: str, *sizes: int) -> CompressedKVCache:
    cache = CompressedKVCache(kv)
    for i, n in enumerate(sizes):
        cache.update_and_fetch(*rows(n, i))
    return cache


def error(cache: CompressedKVCache, truth: mx.array) -> float:
    """Relative error of the ordinary key channels."""
    keys = np.delete(np.array(cache.keys_and_values()[0]), 7, axis=-1)
    want = np.delete(np.array(truth), 7, axis=-1)
    return float(np.abs(keys - want).mean() / np.abs(want).mean())


@pytest.mark.parametrize("switches", SWITCHES)
def test_texts_are_read_back(switches: str) -> None:
    config = CompressionConfig.parse(f"leankv:k3v3,{switches}")
    assert config != CompressionConfig.parse("leankv:k3v3")
    assert CompressionConfig.parse(config.spec()) == config


@pytest.mark.parametrize("text", ["rotation=dct", "center=maybe", "equalize=1"])
def test_unknown_values_are_told(text: str) -> None:
    with pytest.raises(ConfigError):
        CompressionConfig.parse(f"leankv:{text}")


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_model_answers_as_without_compression(switches: str, backend: str) -> None:
    model = TINY["llama"]()
    pieces = chunks(tokens(sum(PROMPT) + sum(STEPS)), [*PROMPT, *STEPS])
    plain = feed(model, make_caches(model), pieces)
    with attach(model, f"leankv:k8v8,{switches},backend={backend}"):
        ours = feed(model, make_caches(model), pieces)
    assert relative(ours, plain) < 0.03


def test_equalization_saves_the_ordinary_channels() -> None:
    sizes = (120, 60, 3, 40)
    truth = mx.concatenate([rows(n, i)[0] for i, n in enumerate(sizes)], axis=2)
    equalized, plain = (
        error(filled(f"leankv:k4v4,equalize={switch}", *sizes), truth) for switch in ("on", "off")
    )
    assert 0 < 2 * equalized < plain


def test_equalization_fitted_in_decode_is_right_for_all_rows() -> None:
    sizes = (90, *(1,) * 40)
    truth = mx.concatenate([rows(n, i)[0] for i, n in enumerate(sizes)], axis=2)
    assert error(filled("leankv:k8v8,equalize=on", *sizes), truth) < 0.01


@pytest.mark.parametrize("kept", [150, 90, 30, 2, 0])
def test_trimming_keeps_the_rest(kept: int) -> None:
    truth = mx.concatenate([rows(200)[0][:, :, :kept], rows(150, 5)[0]], axis=2)
    cache = filled("leankv:k8v8,equalize=on", 200)
    cache.trim(200 - kept)
    cache.update_and_fetch(*rows(150, 5))
    assert error(cache, truth) < 0.01


def test_copies_and_states_carry_the_equalizer() -> None:
    cache = filled("leankv:k4v4,equalize=on", 150, 20)
    want = cache.keys_and_values()[0]
    twins = [copy.deepcopy(cache), CompressedKVCache.from_state(cache.state)]
    for twin in twins:
        assert mx.array_equal(twin.keys_and_values()[0], want)
        assert twin.nbytes == cache.nbytes
    assert cache.nbytes - filled("leankv:k4v4,equalize=off", 150, 20).nbytes == H * D * 4


def test_the_equalizer_is_fitted_to_the_queries_whatever_the_calls() -> None:
    """To those of a prefill, or of the steps before the first tokens leave the window."""
    model = TINY["llama"]()
    ids = tokens(160)
    fitted = []
    with attach(model, "leankv"):
        for pieces in ([160], [120, 40], [1] * 110):
            caches = make_caches(model)
            feed(model, caches, chunks(ids[: sum(pieces)], pieces))
            fitted.append(np.array(caches[0].layer.space.equalizer.scales))
    for scales in fitted:
        assert scales.std() > 0.01
        np.testing.assert_allclose(scales, fitted[0], rtol=0.5)


def test_without_queries_ordinary_keys_stay_as_they_are() -> None:
    cache = CompressedKVCache("leankv")
    cache.update_and_fetch(*rows(160, outlier=1.0))
    assert (np.array(cache.layer.space.equalizer.scales) == 1).all()
