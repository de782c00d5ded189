"""Thresholds of activation sparsity for a model, from what its inputs are like on a text.

Three passes, all forward: how large the channels of each input are (a histogram), how far the
outputs of its weights are off when so many are left out, and how far the model's distributions are
off when half of one input alone is. Small errors of a model add up about as their squares do, so
the cost of an input at a level is that divergence times the square of its output error there beside
that at one half. By output errors alone, in parts of the outputs, a quarter costs SmolLM2 more than
when every input leaves out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np
from mlx import nn

from leankv_mlx.config import UNCOMPRESSED, CompressionConfig
from leankv_mlx.errors import CalibrationError
from leankv_mlx.evaluation.arms import Arm
from leankv_mlx.evaluation.fidelity import Chunk, Corpus, run_fidelity
from leankv_mlx.evaluation.metrics import compare, log_probabilities
from leankv_mlx.mlx_lm.loading import LoadedModel
from leankv_mlx.projections.attach import attach
from leankv_mlx.projections.inputs import Input, Inputs
from leankv_mlx.projections.sparsity import By, Sparsity, Thresholds
from leankv_mlx.projections.sparsity.allocation import LEVELS, Floats, allocated
from leankv_mlx.projections.sparsity.histogram import Histogram
from leankv_mlx.projections.sparsity.measure import Errors, Only, Seen, Sizes
from leankv_mlx.projections.types import Keep
from leankv_mlx.settings import Sparse

Spread = Literal["uniform", "block", "model"]
"""Who leaves out how much: every input alike; every layer alike, and its inputs by what they cost
(as in TEAL, arXiv 2408.14690); or all inputs of the model by what they cost."""

PROBE_TOKENS = 128
_HALF = 0.5
_LEAST = 1e-9  # nats: what cannot be told from rounding

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class _Known:
    """What is known of each input, all in one order.

    Attributes:
        inputs: with how many channels each has.
        sizes: bytes of the weights behind it.
        norms: of their columns; none with "teal".
        errors: [inputs, len(LEVELS)], see `Errors.relative`.
    """

    inputs: dict[Input, int]
    sizes: Floats
    norms: dict[Input, mx.array]
    histograms: dict[Input, Histogram]
    errors: Floats

    def keep(self, at: Input, share: float) -> Keep:
        return Keep(self.histograms[at].threshold(share), self.norms.get(at))

    def values(self, parts: Floats) -> list[float]:
        """Thresholds of inputs that leave out these shares of their channels."""
        pairs = zip(self.inputs, parts, strict=True)
        return [self.histograms[at].threshold(part) for at, part in pairs]


@dataclass(frozen=True)
class Trial:
    """A share that was measured.

    Attributes:
        read: share of the weights' bytes that the last step read.
        ppl: perplexity.
        loss: how much higher it is than with the same cache and all channels, as a share of that.
        kld: mean divergence from the uncompressed model, in nats.
    """

    share: float
    read: float
    ppl: float
    loss: float
    kld: float


def thresholds(
    model: nn.Module,
    by: By,
    spread: Spread,
    shares: Sequence[float],
    chunks: Sequence[Chunk],
    advance: Advance,
) -> Thresholds:
    """Calibrate a model, which is not named in them yet.

    Args:
        shares: of the bytes of the weights, that are to be left out.
        chunks: the text; the first one is also what errors are measured on.

    Raises:
        CalibrationError: the model has no quantized layers whose inputs are known.
    """
    with attach(model):  # once: below it is only told what to do with inputs
        known = _known(model, by, chunks, advance)
        costs = known.errors
        if spread != "uniform":
            costs = costs * _worth(model, known, chunks[0], advance)[:, None]
    rows = [known.values(_parts(known, costs, spread, share)) for share in sorted(shares)]
    return Thresholds(
        by=by,
        shares=tuple(map(float, sorted(shares))),
        inputs=known.inputs,
        values=np.array(rows, np.float32),
        norms=tuple(np.array(norm) for norm in known.norms.values()),
    )


def tried(
    loaded: LoadedModel,
    name: str,
    base: CompressionConfig,
    found: Thresholds,
    texts: Corpus,
    advance: Advance,
) -> list[Trial]:
    """Measure every share of thresholds through the real decode path, calls of few rows.

    Args:
        name: of the calibration.
        base: the cache.
    """
    every = [_arm(base), *(_arm(base, found, Sparse(share, name)) for share in found.shares)]
    measured = run_fidelity(loaded, [Arm(UNCOMPRESSED, None), *every], texts, advance)
    whole, *sparse = every
    return [
        Trial(
            share=arm.config.sparse.share,
            read=arm.sparsity.weights_read,
            ppl=measured[arm.kv].ppl,
            loss=measured[arm.kv].ppl / measured[whole.kv].ppl - 1,
            kld=measured[arm.kv].kld["mean"],
        )
        for arm in sparse
        if arm.config and arm.sparsity
    ]


def _arm(
    base: CompressionConfig, found: Thresholds | None = None, sparse: Sparse | None = None
) -> Arm:
    config = replace(base, sparse=sparse or Sparse())
    sparsity = Sparsity(found.keeps(sparse.share)) if found and sparse else None
    return Arm(config.spec().removeprefix("leankv:"), config, sparsity)


def _known(model: nn.Module, by: By, chunks: Sequence[Chunk], advance: Advance) -> _Known:
    seen = Seen()
    _read(model, seen, chunks[0].tokens[:1])
    if not seen.weights:
        raise CalibrationError(
            "this model has no quantized layers of a known kind, so there is nothing to leave out; "
            "quantize it with mlx_lm.convert -q."
        )
    norms = seen.norms() if by == "wina" else {}
    sizes = Sizes(seen, norms)
    for chunk in chunks:
        _read(model, sizes, chunk.tokens)
        advance("sizes of channels", chunk.context)
    levels = {
        at: np.array([each.threshold(level) for level in LEVELS])
        for at, each in sizes.histograms.items()
    }
    errors = Errors(levels, norms)
    _read(model, errors, chunks[0].tokens)
    advance("errors of outputs", chunks[0].context)
    return _Known(seen.channels(), seen.sizes(), norms, sizes.histograms, errors.relative())


def _parts(known: _Known, costs: Floats, spread: Spread, share: float) -> Floats:
    """The share of its channels that each input leaves out."""
    if spread == "uniform":
        return np.full(len(known.inputs), share)
    if spread == "model":
        return allocated(costs, known.sizes, share)
    parts = np.zeros(len(known.inputs))
    layers = np.array([at.layer for at in known.inputs])
    for layer in np.unique(layers):
        rows = np.flatnonzero(layers == layer)
        parts[rows] = allocated(costs[rows], known.sizes[rows], share)
    return parts


def _worth(model: nn.Module, known: _Known, chunk: Chunk, advance: Advance) -> Floats:
    """What a unit of each input's output error costs the model, in nats of mean divergence."""
    tokens, targets = chunk.tokens[:PROBE_TOKENS], chunk.targets[:PROBE_TOKENS]
    base = _read(model, Seen(), tokens)
    worth = np.zeros(len(known.inputs))
    half = int(np.argmin(np.abs(LEVELS - _HALF)))
    for i, at in enumerate(known.inputs):
        other = _read(model, Only(at, known.keep(at, _HALF)), tokens)
        divergence = max(float(compare(base, other, targets).kl.mean()), _LEAST)
        worth[i] = divergence / max(float(known.errors[i, half]), 1e-30)
        advance("worth of inputs", len(tokens))
    return worth


def _read(model: nn.Module, inputs: Inputs, tokens: mx.array) -> mx.array:
    """Log-probabilities [n, V] behind each of the tokens, not evaluated."""
    with attach(model, inputs):
        return log_probabilities(model(tokens[None])[0])
