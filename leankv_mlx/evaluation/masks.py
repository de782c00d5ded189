"""The look at a mask of key channels: what it keeps, and what its model does with that.

Without the model there is what the file of the mask tells. With it, a generated document is read
once with the model's own caches, which shows how large queries and keys are. Then questions about
it are answered with one KV head after the other holding nothing between sink tokens and window:
how much less likely the expected replies become is how much that head retrieves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from leankv_mlx.cache.masks import Masks, share_of
from leankv_mlx.codec.channels import Channels
from leankv_mlx.codec.format import TILE, padded
from leankv_mlx.evaluation.stress import rope_pairs
from leankv_mlx.evaluation.tables import Grid
from leankv_mlx.evaluation.tasks import document_chat, document_turn, seeded
from leankv_mlx.mlx_lm import prompts
from leankv_mlx.mlx_lm.attachment import attach, make_caches, own_caches
from leankv_mlx.mlx_lm.loading import LoadedModel, check_context
from leankv_mlx.mlx_lm.reading import prefill
from leankv_mlx.mlx_lm.watching import Call, watched

Floats = NDArray[np.float32]
Advance = Callable[[str], None]

_TOKENS = 768
"""Of the document; most of it lies between sink tokens and window."""
_QUESTIONS = 4
_REPLY_TOKENS = 64
"""Room for question and reply behind the document."""
_BANDS = 8
_SHOWN = 16


@dataclass(frozen=True)
class Sizes:
    """Root mean square of each channel after RoPE, [layers, H, head_dim]; of the queries over all
    heads that attend to a KV head."""

    queries: Floats
    keys: Floats


@dataclass(frozen=True)
class Heads:
    """What answers lose without single heads.

    Attributes:
        base: nats for each token of the expected replies, with all heads.
        loss: how many more without the middle tokens of one, [layers, H].
        tokens: of the document.
    """

    base: float
    loss: Floats
    tokens: int

    def ranked(self) -> list[tuple[int, int]]:
        """Layer and head; the first are those without which answers lose most."""
        heads = self.loss.shape[1]
        order = np.argsort(-self.loss, axis=None, kind="stable").tolist()
        return [divmod(int(i), heads) for i in order]


@dataclass(frozen=True)
class Look:
    """What there is to see of a mask.

    Attributes:
        title: what the mask is called.
        pairs: channels by RoPE pair, fastest first, [pairs, 2].
        sizes, heads: None without the model.
    """

    title: str
    masks: Masks
    pairs: NDArray[np.int64]
    sizes: Sizes | None = None
    heads: Heads | None = None

    def by_pair(self) -> Floats:
        """Share of its channels that is kept of each RoPE pair, fastest first, [pairs]."""
        kept: Floats = self.masks.kept[..., self.pairs].mean(axis=(0, 1, 3)).astype(np.float32)
        return kept

    def bands(self) -> list[float]:
        """The same of bands of pairs, fastest first."""
        bands = np.array_split(self.by_pair(), min(_BANDS, len(self.pairs)))
        return [float(band.mean()) for band in bands]

    def correlations(self) -> dict[str, float]:
        """Of what channels are worth with how large they are, by rank (Spearman's); none without
        the model."""
        if self.sizes is None:
            return {}
        q, k = self.sizes.queries, self.sizes.keys
        found = {"queries": q, "keys": k, "queries times keys": q * k}
        return {name: _rank_correlation(self.masks.alphas, x) for name, x in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """For the JSON document."""
        masks = self.masks
        found: dict[str, Any] = {
            "mask": self.title, "digest": masks.digest, "model": masks.name, "ratio": masks.ratio,
            "kept": share_of(masks.layers), "groups": masks.groups.tolist(),
            "kept_by_frequency": self.bands(), "notes": dict(masks.notes),
        }  # fmt: skip
        if self.sizes is not None:
            found["rank_correlations"] = self.correlations()
        if self.heads is not None:
            found["document_tokens"] = self.heads.tokens
            found["reply_nats_per_token"] = self.heads.base
            found["heads"] = [
                {"layer": layer, "head": head, "channels": int(self.masks.channels[layer, head]),
                 "loss": float(self.heads.loss[layer, head])}
                for layer, head in self.heads.ranked()
            ]  # fmt: skip
        return found


def look(title: str, masks: Masks) -> Look:
    """What the file tells. RoPE pairs are taken to be as in most models, one channel of each half
    of a head."""
    return Look(title, masks, rope_pairs(None, masks.alphas.shape[-1]))


def work(masks: Masks) -> int:
    """How often `measured` tells that it advanced."""
    return 1 + masks.groups.size


def measured(loaded: LoadedModel, title: str, masks: Masks, advance: Advance) -> Look:
    """The same, and what the model does.

    Args:
        masks: those of this model.

    Raises:
        UnsupportedError, CalibrationError: the model does not go with the mask.
        ContextLengthError: a document does not fit its context.
    """
    model = loaded.model
    with attach(model, f"k8v8,mask={title}", learned=masks.layers) as attached:
        places = [i for i, layer in enumerate(attached.learned) if layer]
        document, asked = _questions(loaded)
        caches, sums = own_caches(model), SizeSums(places)
        with watched(model, caches, sums.add):
            prefill(model, document, caches)
        advance("reading")
        base = _loss(model, caches, asked)
        losses = [
            _losses_without(model, head, masks, places, caches, asked, advance)
            for head in range(masks.groups.shape[1])
        ]
    loss = (np.array(losses, np.float32) - base).T
    pairs = _pairs(model, masks.alphas.shape[-1])
    return Look(title, masks, pairs, sums.sizes(len(document)), Heads(base, loss, len(document)))


class SizeSums:
    """Squares of queries and keys, summed over tokens as attention calls come.

    Args:
        places: of the layers of the mask among the model's caches.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self._sums: dict[int, list[mx.array]] = {place: [] for place in places}

    def add(self, index: int, call: Call) -> None:
        """See `watching.See`."""
        queries, keys = call.queries, call.keys
        if index not in self._sums:
            return
        (_, heads, _, dim), new = keys.shape, queries.shape[2]
        of_heads = queries.reshape(heads, -1, new, dim).astype(mx.float32).square().mean(axis=1)
        added = [of_heads.sum(axis=1), keys[0, :, -new:].astype(mx.float32).square().sum(axis=1)]
        before = self._sums[index]
        self._sums[index] = [a + b for a, b in zip(before, added, strict=True)] if before else added
        mx.eval(self._sums[index])  # a graph of the whole document would hold all its queries

    def sizes(self, tokens: int) -> Sizes:
        """Once so many tokens came."""
        sides = zip(*self._sums.values(), strict=True)
        return Sizes(*(np.sqrt(np.array(side) / tokens) for side in sides))


Asked = Sequence[tuple[list[int], list[int]]]
"""The end of each prompt, behind the document, and the reply to it."""


def _questions(loaded: LoadedModel) -> tuple[list[int], Asked]:
    """The tokens of a document, and what is asked about it."""
    tokenizer = loaded.tokenizer

    def tokens(turn: str) -> list[int]:
        rendered = prompts.render(tokenizer, [{"role": "user", "content": turn}])
        return prompts.encode(tokenizer, rendered)

    check_context(loaded.config, _TOKENS, _REPLY_TOKENS)
    rng = seeded("calibration", "masks", _TOKENS)
    chat = document_chat(rng, _TOKENS, lambda t: len(tokens(t)), "calibration", hidden=_QUESTIONS)
    turns = [tokens(document_turn(chat.document, fact.question)) for fact in chat.asked]
    shared = min(prompts.shared(turns[0], turn) for turn in turns[1:])
    replies = [prompts.encode(tokenizer, fact.sentence) for fact in chat.asked]
    return turns[0][:shared], [(turn[shared:], r) for turn, r in zip(turns, replies, strict=True)]


def _loss(model: nn.Module, caches: list[Any], asked: Asked) -> float:
    """Nats for each token of the replies, mean; the caches, which hold the document, stay as they
    are."""
    total = count = 0.0
    for question, reply in asked:
        tokens = mx.array([question + reply[:-1]])
        logits = model(tokens, cache=deepcopy(caches))[0, -len(reply) :].astype(mx.float32)
        found = nn.losses.cross_entropy(logits, mx.array(reply), reduction="sum")
        total += float(found)
        count += len(reply)
    return total / count


def _losses_without(
    model: nn.Module,
    head: int,
    masks: Masks,
    places: Sequence[int],
    caches: list[Any],
    asked: Asked,
    advance: Advance,
) -> list[float]:
    """The loss without the middle tokens of a KV head of each layer, one layer after the other.

    That layer is compressed with 8 bits, so nothing else is lost, and the others stay the model's
    own.
    """
    heads, dim = masks.alphas.shape[1:]
    groups = [0 if h == head else padded(dim) // TILE for h in range(heads)]
    without = Channels((tuple(range(dim)),) * heads, tuple(groups))
    found = []
    with attach(model, "k8v8,mask=without", learned=[without] * len(places)):
        made = make_caches(model)
        for layer, place in enumerate(places):
            own, ours = caches[place], made[place]
            ours.update_and_fetch(*(x[..., : own.offset, :] for x in (own.keys, own.values)))
            ours.sequence.narrow()
            changed = [ours if i == place else cache for i, cache in enumerate(caches)]
            found.append(_loss(model, changed, asked))
            advance(f"layer {layer} head {head}")
    return found


def _pairs(model: nn.Module, head_dim: int) -> NDArray[np.int64]:
    """Channels by RoPE pair, see `rope_pairs`."""
    turning = next((module for module in model.modules() if hasattr(module, "rope")), None)
    # Some models have the channels that are not turned in front.
    before = int(getattr(turning, "qk_nope_head_dim", 0))
    return before + rope_pairs(getattr(turning, "rope", None), head_dim - before)


def _rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's, 0 where all of one are equal."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    return float((x * y).sum() / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-9))


def _ranks(values: Floats) -> NDArray[np.float64]:
    """Of each number, flat; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts + 1) / 2
    return means[which]


# Tables.


def tables(look: Look) -> list[Grid]:
    """What there is to see, as text."""
    grids = [_about(look), _counts(look), _layers(look), _frequencies(look)]
    return [*grids, _ranking(look, look.heads)] if look.heads else grids


def _about(look: Look) -> Grid:
    masks = look.masks
    empty = int((masks.groups == 0).sum())
    rows = [
        ["model", masks.name],
        ["digest", masks.digest],
        ["share to leave out", f"{masks.ratio:.1%}"],
        ["key channels kept", f"{share_of(masks.layers):.1%}"],
        ["heads without middle tokens", f"{empty} of {masks.groups.size}"],
        *([name, text] for name, text in masks.notes.items()),
        *(
            [f"rank correlation of worth and size of {name}", f"{value:+.2f}"]
            for name, value in look.correlations().items()
        ),
    ]
    return Grid("Mask of key channels", ("mask", look.title), rows)


def _counts(look: Look) -> Grid:
    kept, counts = np.unique(look.masks.channels, return_counts=True)
    header = ("channels kept", *map(str, kept))
    return Grid("Heads by how much they keep", header, [["heads", *map(str, counts)]])


def _layers(look: Look) -> Grid:
    channels = look.masks.channels
    header = ("layer", *(f"head {h}" for h in range(channels.shape[1])))
    rows = [[str(i), *map(str, row)] for i, row in enumerate(channels)]
    note = "a head that keeps 0 holds no tokens between sink tokens and window"
    return Grid("Channels kept by layer and KV head", header, rows, note)


def _frequencies(look: Look) -> Grid:
    bands = look.bands()
    header = ("RoPE frequencies", "fastest", *[""] * (len(bands) - 2), "slowest")
    rows = [["kept", *(f"{share:.0%}" for share in bands)]]
    return Grid("Share of the channels kept, by frequency", header, rows)


def _ranking(look: Look, heads: Heads) -> Grid:
    rows = [
        [f"layer {layer} head {head}", str(look.masks.channels[layer, head]),
         f"{heads.loss[layer, head]:+.3f}"]
        for layer, head in heads.ranked()[:_SHOWN]
    ]  # fmt: skip
    note = (
        f"nats more for each token of the replies to {_QUESTIONS} questions about a document of "
        f"{heads.tokens} tokens, without the tokens of one head between sink tokens and window; "
        f"{heads.base:.3f} with all heads"
    )
    header = ("head", "channels kept", "loss")
    return Grid("Heads that retrieval loses most without", header, rows, note)
