"""How far one next-token distribution is from another, token by token and in sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}

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
        kld: mean and percentiles of KL(base || other) in nats.
        kld_error: standard error of the mean, tokens taken as independent.
        top1: share of tokens with the same most likely token.
        top1_error: its binomial standard error.
        ppl, ppl_base: perplexities.
        bits_per_byte, bits_per_byte_base: of the scored text, comparable between tokenizers.
    """

    tokens: int
    kld: dict[str, float]
    kld_error: float
    top1: float
    top1_error: float
    ppl: float
    ppl_base: float
    bits_per_byte: float
    bits_per_byte_base: float

    @property
    def ln_ratio(self) -> float:
        """ln(ppl / ppl_base): the loss in nats per token."""
        return math.log(self.ppl / self.ppl_base)

    def as_dict(self) -> dict[str, Any]:
        """The part of an arm's JSON."""
        return {"kld": self.kld, "top1": self.top1, "ppl": self.ppl, "ppl_base": self.ppl_base}


def summarize(scores: TokenScores, text_bytes: int) -> Fidelity:
    """Sum up; `text_bytes` is the size of the scored text in UTF-8."""
    n = len(scores.kl)
    top1 = float(scores.same.mean())
    per_byte = n / (math.log(2) * max(1, text_bytes))
    nll_base, nll = float(scores.nll_base.mean()), float(scores.nll.mean())
    kld = {"mean": float(scores.kl.mean())}
    kld |= {name: float(np.percentile(scores.kl, q)) for name, q in PERCENTILES.items()}
    return Fidelity(
        tokens=n,
        kld=kld,
        kld_error=float(scores.kl.std() / math.sqrt(n)),
        top1=top1,
        top1_error=math.sqrt(top1 * (1 - top1) / n),
        ppl=math.exp(nll),
        ppl_base=math.exp(nll_base),
        bits_per_byte=nll * per_byte,
        bits_per_byte_base=nll_base * per_byte,
    )
