"""How far one next-token distribution is from another, token by token and in sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
_DRAWS = 1000  # of the bootstrap: its own error is then some 2%

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """One number per scored token, [N].

    Attributes:
        kl: KL(base || other) in nats.
        same: 1 where both have the same most likely token, else 0.
        nll_base: negative log-likelihood of the true token under the base, in nats.
        nll: the same under the other.
    """

    kl: Floats
    same: Floats
    nll_base: Floats
    nll: Floats

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """Several stretches of tokens as one."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in cls.__dataclass_fields__
            )
        )


def log_probabilities(logits: mx.array) -> mx.array:
    """logits: [N, V], any float dtype -> float32 [N, V]."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def compare(base: mx.array, other: mx.array, targets: mx.array) -> TokenScores:
    """Compare two distributions over the next token.

    Args:
        base, other: float32 log-probabilities [N, V].
        targets: the true tokens, [N].
    """
    kl = (mx.exp(base) * (base - other)).sum(-1)
    same = base.argmax(-1) == other.argmax(-1)
    nll_base, nll = (
        -mx.take_along_axis(side, targets[:, None], axis=-1)[:, 0] for side in (base, other)
    )
    columns = (kl, same, nll_base, nll)
    mx.eval(columns)  # at once: the two sides are read only one time
    return TokenScores(*(np.array(x, np.float64) for x in columns))


@dataclass(frozen=True)
class Fidelity:
    """Sums over all scored tokens.

    Attributes:
        tokens: how many were scored.
        kld: mean, percentiles and maximum of KL(base || other) in nats.
        kld_error: standard error of the mean, see `summarize`.
        top1: share of tokens with the same most likely token.
        top1_error: its binomial standard error.
        ppl, ppl_base: perplexities.
        ln_ratio_error: standard error of `ln_ratio`, see `summarize`.
        bits_per_byte, bits_per_byte_base: of the scored text, comparable between tokenizers.
    """

    tokens: int
    kld: dict[str, float]
    kld_error: float
    top1: float
    top1_error: float
    ppl: float
    ppl_base: float
    ln_ratio_error: float
    bits_per_byte: float
    bits_per_byte_base: float

    @property
    def ln_ratio(self) -> float:
        """ln(ppl / ppl_base): the loss in nats per token."""
        return math.log(self.ppl / self.ppl_base)

    def as_dict(self) -> dict[str, Any]:
        """The part of an arm's JSON."""
        return {
            "tokens": self.tokens,
            "kld": self.kld,
            "kld_error": self.kld_error,
            "top1": self.top1,
            "top1_error": self.top1_error,
            "ppl": self.ppl,
            "ppl_base": self.ppl_base,
            "ln_ratio": self.ln_ratio,
            "ln_ratio_error": self.ln_ratio_error,
            "bits_per_byte": self.bits_per_byte,
        }


def summarize(chunks: Sequence[TokenScores], text_bytes: int) -> Fidelity:
    """Sum up.

    Standard errors are found by bootstrap over the chunks, because tokens of one text are alike;
    those of a single chunk take its tokens as independent, and are too small.

    Args:
        chunks: what was scored, chunk by chunk.
        text_bytes: size of the scored text in UTF-8.
    """
    scores = TokenScores.joined(chunks)
    n = len(scores.kl)
    top1 = float(scores.same.mean())
    per_byte = n / (math.log(2) * max(1, text_bytes))
    nll_base, nll = float(scores.nll_base.mean()), float(scores.nll.mean())
    kld = {"mean": float(scores.kl.mean())}
    kld |= {name: float(np.percentile(scores.kl, q)) for name, q in PERCENTILES.items()}
    return Fidelity(
        tokens=n,
        kld=kld,
        kld_error=_error([chunk.kl for chunk in chunks]),
        top1=top1,
        top1_error=math.sqrt(top1 * (1 - top1) / n),
        ppl=math.exp(nll),
        ppl_base=math.exp(nll_base),
        ln_ratio_error=_error([chunk.nll - chunk.nll_base for chunk in chunks]),
        bits_per_byte=nll * per_byte,
        bits_per_byte_base=nll_base * per_byte,
    )


def _error(chunks: Sequence[Floats]) -> float:
    """Standard error of the mean over all chunks."""
    if len(chunks) == 1:
        return float(chunks[0].std() / math.sqrt(len(chunks[0])))
    sums = np.array([chunk.sum() for chunk in chunks])
    sizes = np.array([len(chunk) for chunk in chunks])
    drawn = np.random.default_rng(0).integers(len(chunks), size=(_DRAWS, len(chunks)))
    return float((sums[drawn].sum(1) / sizes[drawn].sum(1)).std())
