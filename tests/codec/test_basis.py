"""Bases of keys: exact in the scores, for matrices that are far from orthogonal too."""

from __future__ import annotations

import weakref

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv_mlx.codec.basis import Basis
from leankv_mlx.codec.rotation import hadamard
from leankv_mlx.codec.shaping import FLOOR
from leankv_mlx.errors import ConfigError
from tests.bases import basis as made

H, D = 2, 32


def basis(seed: int = 0) -> Basis:
    return made(H, D, seed=seed)


def rows(heads: int, tokens: int, dim: int = D, seed: int = 0) -> mx.array:
    return mx.random.normal((heads, tokens, dim), key=mx.random.key(seed))


def norm(x: mx.array) -> float:
    return float(mx.linalg.norm(x.astype(mx.float32).flatten()))


CASES = {
    "heads": st.integers(1, 4),
    "group": st.integers(1, 4),
    "dim": st.sampled_from([8, 32, 64, 80]),
    "condition": st.floats(1, 1e3),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_nothing_is_lost_but_rounding(
    heads: int, group: int, dim: int, condition: float, seed: int
) -> None:
    found = made(heads, dim, condition, seed)
    k, q = rows(heads, 5, dim, seed), rows(heads * group, 3, dim, seed + 1)
    turned = found.apply(k)
    error = condition * 1e-6
    assert norm(found.undo(turned) - k) < error * norm(k)
    met = found.queries(q[None])[0]
    wide = [mx.repeat(x, group, axis=0).swapaxes(1, 2) for x in (k, turned)]
    assert norm(met @ wide[1] - q @ wide[0]) < error * norm(k) * norm(q)
    np.testing.assert_allclose(
        np.array(turned)[0, 0], np.array(found.matrix)[0] @ np.array(k)[0, 0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_sequences_of_a_batch_get_what_each_gets_alone(heads: int, tokens: int) -> None:
    found = made(heads, D)
    k, q = (mx.stack([rows(n, tokens, seed=s) for s in range(5)]) for n in (heads, 3 * heads))
    for i in range(5):
        assert mx.array_equal(found.apply(k)[i], found.apply(k[i]))
        assert mx.array_equal(found.queries(q)[i : i + 1], found.queries(q[i : i + 1]))


def test_the_dtype_is_kept() -> None:
    found = basis()
    k = rows(H, 4).astype(mx.bfloat16)
    assert found.apply(k).dtype == found.undo(k).dtype == mx.bfloat16
    assert found.queries(k[None]).dtype == mx.bfloat16
    assert (found.matrix.dtype, found.inverse.dtype) == (mx.float16, mx.float32)


def test_equal_content_is_equal() -> None:
    found = basis()
    again, other = Basis(np.array(found.matrix), np.array(found.costs)), basis(seed=1)
    assert found == again and hash(found) == hash(again) and found is not again
    assert mx.array_equal(found.inverse, again.inverse)
    assert found != other and found != "a basis" and len({found, again, other}) == 2
    assert (found.heads, found.head_dim) == (H, D)


def test_what_lives_is_shared() -> None:
    parts = np.array(basis(3).matrix), np.array(basis(3).costs)
    found = Basis.shared(*parts)
    assert Basis.shared(*(part.copy() for part in parts)) is found
    assert Basis.shared(*(part[:1] for part in parts)) is not found
    assert Basis.shared(parts[0], parts[1][:, ::-1]) is not found
    inverse = weakref.ref(found)
    del found
    assert inverse() is None


def changed(at: tuple[int, ...], value: float) -> np.ndarray:
    found = np.array(basis().matrix).astype(np.float32)
    found[at] = value
    return found


WRONG = {
    "no heads": np.zeros((0, D, D), np.float32),
    "no channels": np.zeros((H, 0, 0), np.float32),
    "one matrix": np.eye(D, dtype=np.float32),
    "matrices that are not square": np.zeros((H, D, D + 1), np.float32),
    "a number that float16 does not have": changed((0, 0, 0), 0.1),
    "a number beyond float16": changed((0, 0, 0), 1e6),
    "one that is none": changed((1, 2, 3), np.nan),
    "one that is infinite": changed((1, 2, 3), np.inf),
    "a singular matrix": np.ones((H, D, D), np.float32),
    "a matrix of zeros": np.zeros((H, D, D), np.float32),
    "one that is nearly singular": np.stack([np.diag([2.0**-12] + [64.0] * (D - 1))] * H),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_makes_no_basis(what: str) -> None:
    with pytest.raises(ConfigError) as error:
        Basis(WRONG[what], np.ones(WRONG[what].shape[:2]))
    assert "\n" not in str(error.value)


COSTS = {
    "one head": np.ones((1, D)),
    "one for each head": np.ones(H),
    "one below 0": np.stack([np.ones(D), np.linspace(-1, 1, D)]).round(2).astype(np.float16),
    "all 0 in a head": np.stack([np.ones(D), np.zeros(D)]),
    "one that is none": np.full((H, D), np.nan),
    "one that float16 does not have": np.full((H, D), 0.1),
}


@pytest.mark.parametrize("what", COSTS)
def test_what_costs_make_no_basis(what: str) -> None:
    with pytest.raises(ConfigError):
        Basis(np.array(basis().matrix), COSTS[what])


def test_the_encoder_gets_the_costs_of_rotated_keys() -> None:
    """The one of errors in the basis is that of the same errors once they are rotated."""
    found, turn = basis(), hadamard(D)
    shaped = np.array(found.shaping(turn), np.float64)
    error = np.random.default_rng(0).standard_normal((H, D))
    rotated = np.array(turn.apply(mx.array(error[:, None].astype(np.float32))))[:, 0]
    costs = np.array(found.costs, np.float64)
    wanted = ((costs / costs.mean(axis=1, keepdims=True) + FLOOR) * error**2).sum(axis=1)
    sizes = np.diagonal(shaped, axis1=1, axis2=2)
    moved = rotated + np.einsum("hij,hi->hj", np.triu(shaped, 1), rotated)
    np.testing.assert_allclose((sizes * moved**2).sum(axis=1), wanted, rtol=1e-4)
    assert found.shaping(turn) is found.shaping(hadamard(D))
