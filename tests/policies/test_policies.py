"""Where policies put slots, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ConfigError
from leankv_mlx.policies import (
    DROP,
    HIGH,
    LOW,
    Budget,
    KeepAll,
    LayerSlots,
    Streaming,
    Threshold,
)
from leankv_mlx.policies.budget import LEAST_SLOTS
from leankv_mlx.policies.shares import FLOOR, descending
from leankv_mlx.settings import LowBits
from leankv_mlx.sparsity.marks import scores_of


def layer(scores: Any, tiers: Any = None, **numbers: Any) -> LayerSlots:
    scores = np.asarray(scores, np.float32)
    tiers = np.zeros(scores.shape, np.int8) if tiers is None else np.asarray(tiers, np.int8)
    defaults: dict[str, Any] = {
        "slot_nbytes": np.array([[100.0] * len(scores), [50.0] * len(scores)]),
        "fixed_nbytes": 900,
        "growth_nbytes": 100,
        "fp16_nbytes": 400 * scores.size,
        "tokens": scores.shape[1],
    }
    return LayerSlots(scores, tiers, **(defaults | numbers))


def cost(plan: np.ndarray, slots: LayerSlots) -> float:
    high, low = slots.slot_nbytes
    return float((plan == HIGH).sum(axis=1) @ high + (plan == LOW).sum(axis=1) @ low)


def test_keep_all_and_streaming() -> None:
    slots = layer([[0.1, 0.2], [0.3, 0.0]], [[HIGH, LOW], [HIGH, DROP]])
    assert KeepAll().plan([slots])[0].tolist() == [[HIGH, LOW], [HIGH, DROP]]
    assert (Streaming().plan([slots])[0] == DROP).all()


def test_heads_that_hold_nothing_take_no_bytes_from_others() -> None:
    """Nothing is set aside for them, and a slot that is cheaper leaves room for more."""
    draw = np.random.default_rng(1)
    scores = np.sort(draw.random((2, 2000)).astype(np.float32))[:, ::-1]
    prices = np.array([[100.0, 100.0], [50.0, 50.0]])
    alone = layer(scores, slot_nbytes=prices, fp16_nbytes=3_200_000)
    none = np.full((6, 2000), DROP, np.int8)
    beside = layer(
        np.concatenate([scores, np.zeros((6, 2000))]),
        np.concatenate([alone.tiers, none]),
        slot_nbytes=np.concatenate([prices, np.zeros((2, 6))], axis=1),
        fp16_nbytes=3_200_000,
    )
    policy = Budget(ratio=24)
    (wanted,), (found,) = (policy.plan([slots]) for slots in (alone, beside))
    assert (found[:2] == wanted).all() and (found[2:] == DROP).all()
    assert 0 < (wanted == HIGH).sum() < 4000
    cheaper = replace(alone, slot_nbytes=prices / [[2.0, 1.0], [2.0, 1.0]])
    (more,) = policy.plan([cheaper])
    assert (more == HIGH).sum() > 1.2 * (wanted == HIGH).sum()
    assert cost(more, cheaper) <= 3_200_000 / 24


def test_thresholds_are_relative_to_the_length() -> None:
    slots = layer([[0.3, 0.05, 0.001, 0.3]], [[HIGH, HIGH, HIGH, LOW]], tokens=10)
    # 3.0, 0.5, 0.01 and 3.0 times 1/N; what is low stays low
    assert Threshold(alpha_high=1.0, alpha_low=0.1).plan([slots])[0].tolist() == [
        [HIGH, LOW, DROP, LOW]
    ]
    assert Threshold(alpha_high=0.4, alpha_low=0.1).plan([slots])[0].tolist() == [
        [HIGH, HIGH, DROP, LOW]
    ]


def test_a_budget_keeps_the_most_significant_slots_of_every_head() -> None:
    rng = np.random.default_rng(0)
    slots = layer(rng.random((4, 2000)) ** 8)
    (plan,) = Budget(ratio=12).plan([slots])
    for head, scores in zip(plan, slots.scores, strict=True):
        assert head.sum() <= 0 and set(head.tolist()) == {HIGH, DROP}
        assert scores[head == HIGH].min() >= scores[head == DROP].max()
        assert (head == HIGH).sum() % 32 == 0  # whole blocks
    room = slots.fp16_nbytes / 12 - slots.fixed_nbytes
    assert room - 4 * 3200 < cost(plan, slots) <= room


def test_heads_that_matter_get_more_and_none_goes_blind() -> None:
    scores = np.full((3, 4000), 1e-6)
    scores[0] = np.linspace(1, 0.5, 4000)
    slots = layer(scores)
    (plan,) = Budget(ratio=20).plan([slots])
    kept = (plan == HIGH).sum(axis=1)
    equal = (slots.fp16_nbytes / 20 - slots.fixed_nbytes) / 100 / 3
    assert kept[0] > 2 * equal and (kept[1:] >= FLOOR * equal - 32).all() and kept[1] == kept[2]


def test_the_high_tier_takes_its_share() -> None:
    slots = layer(np.random.default_rng(0).random((2, 4000)))
    (plan,) = Budget(low=(3, 2), ratio=10, high=0.5).plan([slots])
    room = slots.fp16_nbytes / 10 - slots.fixed_nbytes
    assert (plan == HIGH).sum() * 100 == pytest.approx(room / 2, rel=0.05)
    assert (plan == LOW).sum() * 50 == pytest.approx(room / 2, rel=0.05)
    for head, scores in zip(plan, slots.scores, strict=True):
        assert scores[head == HIGH].min() >= scores[head == LOW].max() >= scores[head == DROP].max()


def test_the_low_tier_goes_to_what_the_high_one_left() -> None:
    scores = np.full((2, 3000), 1e-6)
    scores[0, :1000], scores[1, :1000] = 1, 0.5
    slots = layer(scores)
    room = slots.fp16_nbytes / 16 - slots.fixed_nbytes
    (plan,) = Budget(low=(3, 2), ratio=16, high=0.66).plan([slots])
    assert 0.6 * room < (plan == HIGH).sum() * 100 <= 0.66 * room
    high, low = (plan == HIGH).sum(axis=1), (plan == LOW).sum(axis=1)
    assert high[0] > 2 * high[1] and low[1] > 2 * low[0]


def test_short_prompts_keep_what_costs_little() -> None:
    slots = layer(np.random.default_rng(0).random((2, LEAST_SLOTS + 100)))
    (plan,) = Budget(ratio=1000).plan([slots])
    assert (plan == HIGH).sum() == 2 * LEAST_SLOTS


def test_bytes_of_the_model_bound_the_layers_together() -> None:
    rng = np.random.default_rng(0)
    strong, weak = layer(rng.random((2, 3000))), layer(rng.random((2, 3000)) * 1e-3)
    nbytes = 200_000
    for together in (False, True):
        scope = "model" if together else "layer"
        plans = Budget(ratio=2, budget=nbytes, scope=scope).plan([strong, weak])
        spent = [cost(p, x) for p, x in zip(plans, (strong, weak), strict=True)]
        room = nbytes - 2000 - 4 * 3200  # and a block for each head
        assert room - 4 * 3200 < sum(spent) <= room
        assert (
            spent[0] == pytest.approx(spent[1], rel=0.05)
            if not together
            else (spent[0] > 3 * spent[1])
        )
    assert (Budget(ratio=2, budget=1500).plan([strong, weak])[0] == DROP).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 300), st.floats(1.1, 50), st.floats(0, 1),
    st.integers(0, 1 << 20), st.integers(0, 1000), st.booleans(), st.booleans(),
)  # fmt: skip
def test_no_plan_moves_a_slot_up_or_costs_more_than_it_may(
    heads: int,
    slots: int,
    ratio: float,
    high: float,
    nbytes: int,
    seed: int,
    together: bool,
    tiered: bool,
) -> None:
    rng = np.random.default_rng(seed)
    layers = [
        layer(rng.random((heads, slots)), rng.integers(-1, 2, (heads, slots))) for _ in range(2)
    ]
    scope: Literal["layer", "model"] = "model" if together else "layer"
    low: LowBits = (3, 2) if tiered else "none"
    plans = Budget(low, ratio, nbytes, high, scope).plan(layers)
    for plan, x in zip(plans, layers, strict=True):
        assert plan.shape == x.tiers.shape
        assert (plan[x.tiers == DROP] == DROP).all() and (plan[x.tiers == LOW] != HIGH).all()
    if nbytes:
        spent = sum(cost(plan, x) for plan, x in zip(plans, layers, strict=True))
        assert spent <= max(0, nbytes - 2000) + 1


@pytest.mark.parametrize("kind", ["floats", "marks", "ties"])
def test_ranking_is_that_of_a_stable_sort(kind: str) -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random((3, 500)) ** 20).astype(np.float32)
    if kind == "marks":
        scores = scores_of(rng.integers(0, 256, scores.shape).astype(np.uint8))
    elif kind == "ties":
        scores = rng.integers(0, 3, scores.shape).astype(np.float32) / 3
    scores[:, ::9], scores[:, 5] = -np.inf, 0
    np.testing.assert_array_equal(descending(scores), np.argsort(-scores, axis=1, kind="stable"))


def test_the_settings_make_the_policy() -> None:
    parse = CompressionConfig.parse
    assert parse("leankv").policy == KeepAll()
    assert parse("leankv:policy=streaming").policy == Streaming()
    two = parse("leankv:k8v4,policy=threshold,alpha_high=3,alpha_low=.02")
    assert two.policy == Threshold("auto", 3, 0.02) and two.tiers == ((8, 4), (4, 2))
    assert parse("leankv:policy=threshold").tiers == ((4, 4), (3, 2))
    assert parse("leankv:policy=threshold,low=none").tiers == ((4, 4),)
    one = parse("leankv:policy=budget,ratio=6,budget=2M,scope=model")
    assert one.policy == Budget(ratio=6, budget=2 << 20, scope="model") and one.tiers == ((4, 4),)
    two = parse("leankv:policy=budget,low=k3v2,high=.25")
    assert two.policy == Budget((3, 2), 8, 0, 0.25, "layer") and two.tiers == ((4, 4), (3, 2))


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("policy=threshold,alpha_high=.1,alpha_low=.2", "0 <= alpha_low <= alpha_high"),
        ("policy=threshold,alpha_low=-1", "0 <= alpha_low"),
        ("policy=threshold,alpha_high=nan", "make no sense"),
        ("policy=budget,ratio=1", "above 1"),
        ("policy=budget,ratio=inf", "above 1"),
        ("policy=budget,budget=12Q", "is not a size"),
        ("policy=budget,high=1.5", "0 to 1"),
        ("policy=best", "use one of keep_all, threshold, budget, streaming"),
        ("policy=budget,low=k5v5", "k_bits=5 is not supported"),
        ("policy=budget,low=small", "use kNvM"),
        ("pooling=4", "odd number"),
        ("at=noon", "use one of prompt, chunk"),
        ("layer_bits=k4v4/k4", "use kNvM"),
    ],
)
def test_settings_that_make_no_sense(kv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.parse(f"leankv:{kv}")


@pytest.mark.parametrize(
    "kv",
    [
        "policy=threshold,alpha_high=0.3333333333333333,alpha_low=1e-05",
        "k8v4,policy=budget,low=k3v2,ratio=12.5,budget=1234567,high=0.25,scope=model,at=chunk",
        "policy=budget,scores=repeat,pooling=31",
        "layer_bits=k4v4/k8v8/k3v2,policy=streaming",
    ],
)
def test_settings_survive_their_text(kv: str) -> None:
    config = CompressionConfig.parse(f"leankv:{kv}")
    assert CompressionConfig.parse(config.spec()) == config != CompressionConfig()
