"""Learning the basis of a model's keys: which directions of keys and queries matter.

An error e_j of a stored key changes its score for a query by q_i.e_j, and a change of a score
changes the output of attention by its weight p_ij times (v_j - o_i). So the error of the output is

    sum over i, j of w_ij (q_i.e_j)^2,    w_ij = p_ij^2 |v_j - o_i|^2

if errors of tokens have nothing to do with each other. With codes of keys T k, whose error the
rotation spreads over all directions, that is the product of two sums over the directions: the size
of T (k - c), and that of the queries T^-T q, both weighted by w. With Ck and Cq, the covariance of
the keys and the second moment of the queries so weighted, and U L U^T = Cq^1/2 Ck Cq^1/2, it is
least for T = L^-1/4 U^T Cq^1/2, in which both are the diagonal matrix L^1/2 (Cauchy-Schwarz, as
in `codec.equalize`, which is the best diagonal T for weights that are all alike). That diagonal is
also what an error in each direction costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.cache.bases import FILES, Bases
from leankv_mlx.codec.basis import Basis
from leankv_mlx.config import CompressionConfig
from leankv_mlx.errors import ContextLengthError, UnsupportedError, UsageError
from leankv_mlx.evaluation.lab import Progress
from leankv_mlx.evaluation.tasks import seeded
from leankv_mlx.learning.beginning import layers_of
from leankv_mlx.learning.lessons import Material, text_of
from leankv_mlx.mlx_lm.attachment import own_caches
from leankv_mlx.mlx_lm.context import context_length
from leankv_mlx.mlx_lm.loading import LoadedModel, fingerprint, load
from leankv_mlx.mlx_lm.precision import compute_in_float32
from leankv_mlx.mlx_lm.reading import PREFILL_CHUNK, prefill
from leankv_mlx.mlx_lm.watching import Call, watched

SHRINK = 0.02
"""Share of its mean eigenvalue that each matrix gets more of in every direction: other texts have
something of their own in directions that this one hardly uses."""
FIRST, EVERY = 256, 4
"""Queries that are looked at: from this token on, one in so many."""

_PLAIN = CompressionConfig()
_LEAST_TOKENS = 512
_METHOD = "weighted covariances, 2"

Matrices = NDArray[np.float64]


class Moments:
    """How the keys and queries of one layer lie, each counted by what an error of its scores does
    to the output. Only scores that codes are read for count: those of tokens between sink tokens
    and window.

    Attributes:
        keys: sums of (k - c)(k - c)^T, float64 [H, head_dim, head_dim]; c is the mean of the first
            keys behind the sink tokens, which the cache subtracts too.
        queries: sums of q q^T, likewise.
    """

    def __init__(self, heads: int, dim: int) -> None:
        self.keys: Matrices = np.zeros((heads, dim, dim))
        self.queries: Matrices = np.zeros((heads, dim, dim))
        self._center = mx.zeros((heads, dim))

    def add(self, call: Call) -> None:
        """A call of a text that is read from its beginning, a few hundred tokens at a time.

        Raises:
            UnsupportedError: the model masks tokens itself.
        """
        if isinstance(call.mask, mx.array):
            raise UnsupportedError(
                "learning rotations does not go with a model that masks tokens itself."
            )
        (_, heads, length, dim), new = call.keys.shape, call.queries.shape[2]
        if length == new:
            self._center = call.keys[0, :, _PLAIN.sink_tokens :].astype(mx.float32).mean(axis=1)
        start = length - new
        first = max(FIRST, start + -start % EVERY)
        if first >= length:
            return
        at = mx.arange(first, length, EVERY)
        queries = call.queries[0, :, first - start :: EVERY].reshape(heads, -1, len(at), dim)
        sinks = call.sink_logits
        of_heads = None if sinks is None else sinks.reshape(heads, -1)
        for head in range(heads):  # one at a time: all of their scores are hundreds of megabytes
            found = _weighted(
                queries[head].astype(mx.float32),
                call.keys[0, head].astype(mx.float32),
                call.values[0, head].astype(mx.float32),
                at, call.scale, None if of_heads is None else of_heads[head],
                self._center[head],
            )  # fmt: skip
            mx.eval(found)
            self.keys[head] += np.array(found[0])
            self.queries[head] += np.array(found[1])

    def basis(self) -> Basis:
        """The best for what came."""
        pairs = zip(self.keys, self.queries, strict=True)
        found = [best(keys, queries) for keys, queries in pairs]
        return Basis(*(np.stack(parts).astype(np.float16) for parts in zip(*found, strict=True)))


def _weighted(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    at: mx.array,
    scale: float,
    sinks: mx.array | None,
    center: mx.array,
) -> tuple[mx.array, mx.array]:
    """Of one KV head, the sums of `Moments`: queries [G, n, d] of the tokens `at` [n], keys and
    values [N, ..], sinks [G]."""
    scores = scale * (queries @ keys.T)
    places = mx.arange(keys.shape[0])
    scores = mx.where(places > at[:, None], -mx.inf, scores)
    if sinks is not None:
        column = mx.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        scores = mx.concatenate([scores, column.astype(scores.dtype)], axis=-1)
    shares = mx.softmax(scores, axis=-1, precise=True)[..., : keys.shape[0]]
    out = shares @ values
    away = values.square().sum(axis=-1) - 2 * (out @ values.T)
    away = mx.maximum(away + out.square().sum(axis=-1, keepdims=True), 0)
    coded = (places >= _PLAIN.sink_tokens) & (places <= at[:, None] - _PLAIN.window)
    weights = mx.where(coded, shares.square() * away, 0)
    centered = keys - center
    of_keys = (centered * weights.sum(axis=(0, 1))[:, None]).T @ centered
    flat = queries.reshape(-1, queries.shape[-1])
    of_queries = (flat * weights.sum(axis=-1).reshape(-1, 1)).T @ flat
    return of_keys, of_queries


def best(keys: Matrices, queries: Matrices) -> tuple[Matrices, Matrices]:
    """The matrix T of a KV head, [d, d], and what errors cost there, [d], 1 in the mean: those of
    the module's docstring, scaled so that keys keep their mean size. The identity and 1 if nothing
    is known.

    Args:
        keys: covariance of the keys, up to a factor, [d, d].
        queries: second moment of the queries, likewise.
    """
    dim = len(keys)
    if not (np.trace(keys) > 0 and np.trace(queries) > 0):
        return np.eye(dim), np.ones(dim)
    keys, queries = (x / np.trace(x) * dim + SHRINK * np.eye(dim) for x in (keys, queries))
    sizes, turns = np.linalg.eigh(queries)
    root = (turns * np.sqrt(sizes)) @ turns.T
    sizes, turns = np.linalg.eigh(root @ keys @ root)
    found: Matrices = sizes[:, None] ** -0.25 * (turns.T @ root)
    found *= np.sqrt(np.trace(keys) / np.trace(found @ keys @ found.T))
    costs: Matrices = np.sqrt(sizes)
    return found, costs / costs.mean()


def taught(
    model: str | None, name: str, material: Material, progress: Progress
) -> tuple[Bases, Path]:
    """Load a model, learn its basis from texts, and write that.

    Args:
        material: so many texts of so many tokens.

    Returns:
        The bases of its layers, and their file.

    Raises:
        ModelError: the model cannot be loaded.
        UnsupportedError: it cannot have a basis.
        ContextLengthError: texts of this length do not fit its context.
        UsageError: there is too little text.
        CalibrationError: the file cannot be written.
    """
    if material.documents < 1:
        raise UsageError(f"--documents {material.documents} is too small; give at least 1.")
    if material.tokens < _LEAST_TOKENS:
        raise UsageError(f"--tokens {material.tokens} is too small; give at least {_LEAST_TOKENS}.")
    loaded = load(model)
    compute_in_float32(loaded.model)
    context = context_length(loaded.config)
    if context is not None and material.tokens > context:
        raise ContextLengthError(
            f"texts of {material.tokens} tokens do not fit the model's context of {context}; "
            "give fewer --tokens."
        )
    layers = learned(loaded, material, progress)
    text = material.text
    notes = {
        "method": _METHOD,
        "tokens": str(material.tokens),
        "documents": str(material.documents),
        "seed": str(material.seed),
        "text": "generated" if text is None else hashlib.sha256(text.encode()).hexdigest()[:8],
    }
    found = Bases(tuple(layers), fingerprint(loaded.path), loaded.path.name, notes)
    return found, FILES.save(found, name)


def learned(loaded: LoadedModel, material: Material, progress: Progress) -> Sequence[Basis]:
    """The bases of the layers of a model whose caches are compressed, in order.

    Raises:
        UnsupportedError, UsageError: see `taught`.
    """
    places, shapes = layers_of(loaded.model, "learning rotations")
    moments = {place: Moments(*shape) for place, shape in zip(places, shapes, strict=True)}

    def see(index: int, call: Call) -> None:
        if index in moments:
            moments[index].add(call)

    rngs = (seeded("train", "rotations", material.seed, i) for i in range(material.documents))
    texts = [text_of(loaded, material, rng) for rng in rngs]  # all, before anything is read
    progress.start(material.documents * material.tokens)
    for tokens in texts:
        caches = own_caches(loaded.model)

        def read(done: int, _: int) -> None:
            if done:
                progress.advance("reading texts", (done - 1) % PREFILL_CHUNK + 1)

        with watched(loaded.model, caches, see):
            prefill(loaded.model, tokens, caches, read)
    return [found.basis() for found in moments.values()]
