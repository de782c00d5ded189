"""A budget in bytes holds, or there is an error, whatever the sizes of the calls.

The kind of fault: a policy that silently does not act, because a call looks like another kind.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.generate import speculative_generate_step

from leankv_mlx import attach
from leankv_mlx.errors import ConfigError
from leankv_mlx.mlx_lm.attachment import make_caches
from tests.cache.test_placement import Stack
from tests.models import TINY

NBYTES = 300_000
KV = f"leankv:policy=budget,ratio=1.01,budget={NBYTES},window=32"
EXTRA = ["", ",scope=model", ",low=k3v2", ",scores=repeat", ",at=chunk", ",sink_tokens=0"]
EXTRA += [",mask=some", ",mask=some,low=k3v2,scope=model"]
SIZES = st.sampled_from([1, 2, 3, 5, 8, 9, 12, 16, 17, 31, 33, 40, 63, 64, 65, 130, 400])


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(SIZES, min_size=5, max_size=40), extra=st.sampled_from(EXTRA))
def test_the_budget_holds_after_every_call(sizes: list[int], extra: str) -> None:
    stack = Stack(KV + extra)
    for size in sizes:
        stack.feed(size)
        assert stack.allocated <= NBYTES, sizes


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 70), nbytes=st.integers(100_000, 300_000))
def test_the_budget_holds_or_there_is_an_error(size: int, nbytes: int) -> None:
    stack = Stack(f"leankv:policy=budget,budget={nbytes},window=32")
    over = 0  # tokens since it was exceeded: an error waits for a second call, or for a flush
    with suppress(ConfigError):
        for _ in range(1500 // size):
            stack.feed(size)
            over = over + size if stack.allocated > nbytes else 0
            assert over <= 2 * max(size, 32)


@pytest.mark.parametrize("chunk", [3, 8, 9, 200])
def test_chunks_of_any_size_are_placed_as_they_come(chunk: int) -> None:
    stack = Stack("leankv:policy=budget,ratio=8,window=32,at=chunk", layers=1)
    most = 0
    for _ in range(1800 // chunk):
        stack.feed(chunk)
        stack.feed(1 + chunk)  # of two sizes, or small ones were taken for its end
        most = max(most, stack.slots[0])
        if stack.caches[0].offset > 1800:
            break
    assert 0 < most < 2 * (256 + 2 * chunk + 96)


def test_a_layer_whose_attention_never_comes_is_told_of() -> None:
    stack = Stack(f"leankv:policy=budget,budget={NBYTES},window=32")
    stack.feed(3000, attend=False)
    with pytest.raises(ConfigError, match="does not hold"):
        _unseen(stack, 40)


def _unseen(stack: Stack, steps: int) -> None:
    for _ in range(steps):
        stack.feed(1, attend=False)


@pytest.mark.parametrize(("drafts", "direct"), [(3, False), (8, True), (15, False)])
def test_drafts_are_no_prompt(drafts: int, direct: bool) -> None:
    model, draft = TINY["llama"](), TINY["llama"]()
    noise = {k: 0.02 * mx.random.normal(w.shape) + w for k, w in tree_flatten(draft.parameters())}
    draft.load_weights(list(noise.items()))
    nbytes, prompt = 600_000, mx.array(np.random.default_rng(0).integers(0, 100, 2000))
    with attach(model, f"leankv:policy=budget,ratio=1.01,budget={nbytes},window=32"):
        caches = make_caches(model)
        loop: Any = speculative_generate_step if direct else _as_called("speculative_generate_step")
        used = [
            sum(c.memory().allocated for c in caches)
            for _ in loop(prompt, model, draft, num_draft_tokens=drafts, max_tokens=120,
                          prompt_cache=[*caches, *make_caches(draft)])
        ]  # fmt: skip
        assert len(used) == 120 and max(used[drafts + 1 :]) <= nbytes
        assert all(c.layer.placed for c in caches)


def test_a_prompt_in_small_chunks_is_judged_by_its_end() -> None:
    model = TINY["llama"]()
    prompt = mx.array(np.random.default_rng(0).integers(0, 100, 700))
    for chunk in (3, 8, 9, 512):
        with attach(model, "leankv:policy=budget,ratio=12,window=32"):
            caches = make_caches(model)
            steps = _as_called("generate_step")(
                prompt, model, max_tokens=2, prompt_cache=caches, prefill_step_size=chunk
            )
            assert len(list(steps)) == 2
            assert {c.layer.placed for c in caches} == {700}, chunk


def _as_called(name: str) -> Any:
    """A loop of mlx-lm, looked up as its own functions do."""
    return vars(import_module("mlx_lm.generate"))[name]


def test_drafts_of_a_model_that_drops_tokens_itself_are_taken_back() -> None:
    model, draft = TINY["llama"](), TINY["llama"](layers=1)
    prompt = mx.array(np.random.default_rng(0).integers(0, 100, 900))
    kv = "leankv:policy=budget,ratio=12,window=32"
    with attach(model, kv), attach(draft, kv):
        main, drafts = make_caches(model), make_caches(draft)
        loop = _as_called("speculative_generate_step")
        steps = loop(prompt, model, draft, num_draft_tokens=9, max_tokens=80,
                     prompt_cache=[*main, *drafts])  # fmt: skip
        assert len(list(steps)) == 80
        assert all(cache.layer.placed for cache in (*main, *drafts))
        # The last token may not be in it: mlx-lm yields it before it is read.
        assert {cache.offset for cache in main} <= {979, 980}
        following = loop(mx.array([1, 2, 3]), model, draft, num_draft_tokens=9, max_tokens=20,
                         prompt_cache=[*main, *drafts])  # fmt: skip
        assert len(list(following)) == 20  # the next turn, with caches that dropped tokens
