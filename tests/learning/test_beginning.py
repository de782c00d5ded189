"""Beginnings of texts: what is read once serves every lesson, and no lesson changes it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from leankv_mlx.errors import UnsupportedError
from leankv_mlx.learning.beginning import Beginning, places_of, read
from leankv_mlx.learning.gates import logits
from leankv_mlx.mlx_lm.patches import asking
from leankv_mlx.mlx_lm.precision import compute_in_float32
from tests.learning.tiny import drawn
from tests.models import TINY

STOPS = [90, 530, 570]


def arrays(beginning: Beginning) -> list[mx.array]:
    """Everything that a beginning holds."""
    states = [beginning.others[place].state for place in sorted(beginning.others)]
    rows = [beginning.rows[place] for place in sorted(beginning.rows)]
    return [x for _, x in tree_flatten([rows, states]) if x is not None]


def behind(model: nn.Module, beginning: Beginning, text: list[int]) -> mx.array:
    found = logits(model, beginning, text[beginning.tokens : beginning.tokens + 5], None)
    mx.eval(found)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "qwen3_next", "lfm2"])
def test_one_reading_gives_what_separate_ones_give(name: str) -> None:
    """Also where the caches that no mask is for slide, or have a state; later reading and lessons
    change none of them."""
    text = drawn(600)
    model = TINY[name](64)
    wanted = model(mx.array([text]))[0]
    with asking(model):
        together = read(model, text, STOPS)
        before = [[mx.array(x) for x in arrays(beginning)] for beginning in together]
        for _ in range(2):
            for stop, beginning in zip(STOPS, together, strict=True):
                assert beginning.tokens == stop
                found = behind(model, beginning, text)
                assert mx.abs(found - wanted[stop : stop + 5]).max() < 2e-3
        for beginning, held in zip(together, before, strict=True):
            (alone,) = read(model, text, [beginning.tokens])
            assert mx.abs(behind(model, alone, text) - behind(model, beginning, text)).max() < 1e-3
            for place, rows in alone.rows.items():
                for one, other in zip(rows, beginning.rows[place], strict=True):
                    assert one.shape == other.shape and mx.abs(one - other).max() < 1e-3
            assert all(map(mx.array_equal, arrays(beginning), held))
    assert sorted(together[0].rows) == places_of(model) == list(TINY[name].compressed)
    assert len(together[0].others) == len(model.layers) - len(together[0].rows)


def test_beginnings_of_a_text_take_the_memory_of_the_longest() -> None:
    model, text = TINY["llama"](64), drawn(1000)
    with asking(model):
        before = mx.get_active_memory()
        found = read(model, text, [700, 800, 900, 1000])
        taken = mx.get_active_memory() - before
    longest = sum(x.nbytes for rows in found[-1].rows.values() for x in rows)
    assert longest == 3 * 2 * 2 * 1000 * 64 * 4 <= taken < 1.2 * longest


def test_rows_have_what_the_cache_keeps_exact_rows_in() -> None:
    """The 16 bits of the weights, also where the model computes in float32."""
    text = drawn(100)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model = TINY["llama"](64, dtype)
        with asking(model):
            (own,) = read(model, text, [100])
        assert {x.dtype for rows in own.rows.values() for x in rows} == {dtype}
    compute_in_float32(model)
    with asking(model):
        (beginning,) = read(model, text, [100])
    assert model(mx.array([text])).dtype == mx.float32
    assert {x.dtype for rows in beginning.rows.values() for x in rows} == {mx.float16}


def test_attention_is_the_model_s_own_again_afterwards() -> None:
    from mlx_lm.models import llama

    original = llama.scaled_dot_product_attention
    asks = asking(TINY["llama"](64))
    asks.__enter__()
    assert llama.scaled_dot_product_attention is not original
    assert not asks.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert llama.scaled_dot_product_attention is original


def _own_array(h: mx.array, cache: Any = None) -> mx.array:
    at = mx.arange(cache.offset + h.shape[1])
    return (at <= at[-h.shape[1] :, None]) & (at > at[-h.shape[1] :, None] - 20)


def _window_of_the_cache(h: mx.array, cache: Any = None) -> Any:
    return cache.make_mask(h.shape[1], window_size=20)


def _array_of_the_cache(h: mx.array, cache: Any = None) -> Any:
    return cache.make_mask(h.shape[1], return_array=True)


@pytest.mark.parametrize("masks", [_own_array, _window_of_the_cache, _array_of_the_cache])
def test_a_model_that_masks_tokens_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, masks: Any
) -> None:
    """What it hides would be seen; sliding layers can have mlx-lm's plain cache, too."""
    from mlx_lm.models import llama

    model, text = TINY["llama"](64), drawn(100)
    with asking(model):
        (beginning,) = read(model, text, [90])
        monkeypatch.setattr(llama, "create_attention_mask", masks)
        with pytest.raises(UnsupportedError, match="masks tokens itself"):
            logits(model, beginning, text[90:], None)
        with pytest.raises(UnsupportedError, match="masks tokens itself"):
            read(model, text, [90])
