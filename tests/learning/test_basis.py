"""The learned basis: it is what the formula says, and the best there is."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.errors import UnsupportedError
from leankv_mlx.evaluation.lab import Progress
from leankv_mlx.learning import basis as module
from leankv_mlx.learning.basis import FIRST, SHRINK, Moments, best, learned
from leankv_mlx.learning.lessons import Material
from leankv_mlx.mlx_lm.watching import Call
from tests.bases import matrix
from tests.learning import tiny
from tests.models import TINY

HEADS, GROUP, DIM, V_DIM = 2, 3, 16, 8
SINKS, WINDOW = 4, 64


def covariance(seed: int, condition: float = 30.0) -> np.ndarray:
    root = matrix(DIM, condition, seed).astype(np.float64)
    return root @ root.T


def cost(found: np.ndarray, keys: np.ndarray, queries: np.ndarray) -> float:
    """The size of turned keys times that of turned queries."""
    back = np.linalg.inv(found)
    return float(np.trace(found @ keys @ found.T) * np.trace(back.T @ queries @ back))


def shrunk(x: np.ndarray) -> np.ndarray:
    return x + SHRINK * np.trace(x) / DIM * np.eye(DIM)


def test_no_other_matrix_costs_less() -> None:
    keys, queries = covariance(0), covariance(1)
    found, _ = best(keys, queries)
    wide = shrunk(keys), shrunk(queries)
    least = cost(found, *wide)
    assert least < 0.6 * cost(np.eye(DIM), *wide)
    draw = np.random.default_rng(0)
    for size in (0.01, 0.1, 1):
        other = (np.eye(DIM) + size * draw.standard_normal((DIM, DIM))) @ found
        assert cost(other, *wide) > least
    for factor in (1e-6, 1e6):
        np.testing.assert_allclose(
            np.abs(best(factor * keys, queries)[0]), np.abs(found), rtol=1e-6
        )


def test_keys_and_queries_are_alike_in_it_and_keys_keep_their_size() -> None:
    keys, queries = covariance(2), covariance(3)
    found, costs = best(keys, queries)
    turned = found @ shrunk(keys) @ found.T
    back = np.linalg.inv(found)
    asked = back.T @ shrunk(queries) @ back
    diagonal = np.diag(turned)
    np.testing.assert_allclose(turned, np.diag(diagonal), atol=1e-9)
    ratio = diagonal / np.diag(asked)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-8)
    np.testing.assert_allclose(costs, np.diag(asked) / np.diag(asked).mean(), rtol=1e-8)
    assert np.trace(turned) == pytest.approx(np.trace(shrunk(keys)), rel=1e-9)


@pytest.mark.parametrize("dead", ["keys", "queries", "both"])
def test_nothing_known_changes_nothing(dead: str) -> None:
    keys = np.zeros((DIM, DIM)) if dead != "queries" else covariance(0)
    queries = np.zeros((DIM, DIM)) if dead != "keys" else covariance(0)
    found, costs = best(keys, queries)
    np.testing.assert_array_equal(found, np.eye(DIM))
    assert (costs == 1).all()


def test_a_direction_that_is_never_used_does_no_harm() -> None:
    flat = np.diag([1.0] * (DIM - 1) + [0.0])
    for keys, queries in ((flat, covariance(0)), (covariance(0), flat), (flat, flat)):
        assert np.linalg.cond(best(keys, queries)[0]) < 100


# What is counted.


def call(tokens: int, new: int, seed: int = 0, **changes: Any) -> Call:
    """The last `new` of so many tokens of a text, with a large mean of the keys."""
    draw = np.random.default_rng(seed)
    q, k, v = (
        draw.standard_normal((1, heads, 700, dim)).astype(np.float32)
        for heads, dim in ((HEADS * GROUP, DIM), (HEADS, DIM), (HEADS, V_DIM))
    )
    k += 5 * np.arange(DIM, dtype=np.float32) / DIM
    q, k, v = (mx.array(x[:, :, :tokens]) for x in (q, k, v))
    found = Call(q[:, :, tokens - new :], k, v, 0.3, "causal", None)
    return found._replace(**changes)


def expected(tokens: int, center: np.ndarray, sinks: np.ndarray | None = None) -> tuple[Any, Any]:
    """The same sums, one score at a time."""
    whole = call(tokens, tokens)
    q, k, v = (np.array(x[0]).astype(np.float64) for x in whole[:3])
    keys, queries = (np.zeros((HEADS, DIM, DIM)) for _ in range(2))
    for head in range(HEADS * GROUP):
        of = head // GROUP
        for i in range(FIRST, tokens, 4):
            shares = np.exp(0.3 * k[of, : i + 1] @ q[head, i])
            shares /= shares.sum() + (0 if sinks is None else np.exp(sinks[head]))
            away = v[of, : i + 1] - shares @ v[of, : i + 1]
            for j in range(SINKS, i - WINDOW + 1):
                weight = shares[j] ** 2 * (away[j] @ away[j])
                error = k[of, j] - center[of]
                keys[of] += weight * np.outer(error, error)
                queries[of] += weight * np.outer(q[head, i], q[head, i])
    return keys, queries


@pytest.mark.parametrize("sinks", [False, True])
def test_scores_count_by_what_their_errors_do(sinks: bool) -> None:
    logits = np.linspace(-2, 6, HEADS * GROUP) if sinks else None
    changes = {} if logits is None else {"sink_logits": mx.array(logits.astype(np.float32))}
    found = Moments(HEADS, DIM)
    for tokens, new in ((250, 250), (270, 20), (273, 3), (300, 27)):
        found.add(call(tokens, new, **changes))
    center = np.array(call(250, 250).keys[0, :, SINKS:]).mean(axis=1)
    keys, queries = expected(300, center, logits)
    np.testing.assert_allclose(found.keys, keys, rtol=1e-3, atol=1e-4 * keys.max())
    np.testing.assert_allclose(found.queries, queries, rtol=1e-3, atol=1e-4 * queries.max())


def test_a_further_text_has_its_own_center() -> None:
    both, one, other = (Moments(HEADS, DIM) for _ in range(3))
    moved = call(400, 400, 1)
    moved = moved._replace(keys=moved.keys + 50)
    for moments, texts in (
        (one, [call(400, 400)]),
        (other, [moved]),
        (both, [call(400, 400), moved]),
    ):
        for text in texts:
            moments.add(text)
    np.testing.assert_allclose(both.keys, one.keys + other.keys, rtol=1e-6)
    assert np.abs(other.keys).max() < 10 * np.abs(one.keys).max()


def test_a_model_that_masks_tokens_itself_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="masks tokens itself"):
        Moments(HEADS, DIM).add(call(300, 300, mask=mx.ones((300, 300), mx.bool_)))


# A model.


def of_model(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, list[int]]:
    told: list[int] = []
    monkeypatch.setattr(module, "text_of", lambda *_: tiny.drawn(600))
    progress = Progress(told.append, lambda _, tokens: told.append(tokens))
    loaded = tiny.loaded(TINY[name](**options))
    return learned(loaded, Material(2, 600, 0), progress), told


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "lfm2"])
def test_each_compressed_layer_has_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = of_model(name, monkeypatch)
    assert len(found) == len(TINY[name].compressed)
    assert len(set(found)) == len(found)  # none is that of another layer
    assert told == [1200, 512, 88, 512, 88]
    again, _ = of_model(name, monkeypatch)
    assert found == again


def test_models_whose_caches_are_not_asked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="learning rotations does not go with this model"):
        of_model("gemma2", monkeypatch)
    with pytest.raises(UnsupportedError, match="learning rotations does nothing with this model"):
        of_model("deepseek_v3", monkeypatch)
