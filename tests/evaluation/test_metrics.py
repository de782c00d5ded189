"""The fidelity metrics against NumPy on known distributions."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.evaluation.metrics import TokenScores, compare, log_probabilities, summarize


def log_p(rows: list[list[float]]) -> mx.array:
    return log_probabilities(mx.log(mx.array(rows)))


def test_divergence_of_known_distributions() -> None:
    base, other = log_p([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), log_p([[0.25, 0.5, 0.25]] * 2)
    scores = compare(base, other, mx.array([1, 0]))
    half = math.log(2)
    second = 0.8 * math.log(3.2) + 0.1 * math.log(0.2) + 0.1 * math.log(0.4)
    np.testing.assert_allclose(scores.kl, [0.25 * half, second], rtol=1e-5)
    np.testing.assert_array_equal(scores.same, [0, 0])
    np.testing.assert_allclose(scores.nll_base, [2 * half, -math.log(0.8)], rtol=1e-5)
    np.testing.assert_allclose(scores.nll, [half, 2 * half], rtol=1e-5)


def test_random_logits_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 3, (2, 50, 97))
    targets = rng.integers(0, 97, 50)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    scores = compare(
        log_probabilities(mx.array(a.astype(np.float32))),
        log_probabilities(mx.array(b.astype(np.float32))),
        mx.array(targets),
    )
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-4)
    found = summarize([scores], text_bytes=100)
    assert found.kld["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    for name, percent in {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9}.items():
        assert found.kld[name] == pytest.approx(np.percentile(kl, percent), rel=1e-4)
    nll_base, nll = (-x[np.arange(50), targets].mean() for x in (p, q))
    assert found.ppl_base == pytest.approx(np.exp(nll_base), rel=1e-4)
    assert found.ppl == pytest.approx(np.exp(nll), rel=1e-4)
    assert found.ln_ratio == pytest.approx(nll - nll_base, rel=1e-3)
    assert found.bits_per_byte == pytest.approx(50 * nll / math.log(2) / 100, rel=1e-4)
    agreed = (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.top1 == pytest.approx(agreed)
    assert found.top1_error == pytest.approx(math.sqrt(agreed * (1 - agreed) / 50))


def test_equal_distributions_have_no_divergence() -> None:
    base = log_probabilities(mx.random.normal((9, 40), key=mx.random.key(0)))
    found = summarize([compare(base, base, mx.zeros(9, mx.int32))], 1)
    assert set(found.kld.values()) == {0.0}
    assert (found.top1, found.top1_error, found.ln_ratio, found.tokens) == (1.0, 0.0, 0.0, 9)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = mx.random.normal((3, 5), key=mx.random.key(1)).astype(mx.bfloat16)
    assert log_probabilities(logits).dtype == mx.float32


def test_stretches_are_joined_in_order() -> None:
    parts = [TokenScores(*(np.full(n, n + i, float) for i in range(4))) for n in (1, 2)]
    joined = TokenScores.joined(parts)
    assert joined.kl.tolist() == [1, 2, 2] and joined.nll.tolist() == [4, 5, 5]


def test_errors_are_those_of_chunks_that_differ_as_wholes() -> None:
    """Tokens of a chunk are alike here: their number says nothing about the error."""
    rng = np.random.default_rng(0)
    levels = rng.normal(1.0, 0.1, 40)
    chunks = [TokenScores(*(np.full(50, level) for _ in range(4))) for level in levels]
    found = summarize(chunks, 1)
    expected = levels.std() / math.sqrt(len(levels))
    assert found.kld_error == pytest.approx(expected, rel=0.1)
    assert found.ln_ratio_error == 0  # both sides are as likely in every chunk
    joined = summarize([TokenScores.joined(chunks)], 1)
    assert joined.kld_error == pytest.approx(expected / math.sqrt(50), rel=0.1)
    assert joined.kld == found.kld
