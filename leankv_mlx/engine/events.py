"""What the engine tells: plain frozen data, safe to hand to another thread or to write down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["load", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Loading:
    """A model is being loaded; `model` is what was asked for, "" the bundled one."""

    model: str


@dataclass(frozen=True, slots=True)
class Downloading:
    """Bytes of a model on their way from the hub; `total` 0 while it is not known."""

    model: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model is ready.

    Attributes:
        model: what was asked for, "" the bundled one.
        name: what to call it.
        context: tokens it was made for, 0 if its config does not say.
        kv: the setting in use, "none" for the uncompressed cache.
        backend: what runs the kernels, "none" without compression.
        layers: entries of its cache list.
        compressed: how many of them are compressed.
        note: why nothing is compressed, where that is so.
        weights: bytes of its parameters.
        budget: bytes that the KV cache may take.
    """

    model: str
    name: str
    context: int
    kv: str
    backend: str
    layers: int
    compressed: int
    note: str
    weights: int
    budget: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens read so far. `reused` of the prompt were in the cache and are not read."""

    request: int
    done: int
    total: int
    reused: int


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the reply; `tokens` is how many tokens the reply has with it."""

    request: int
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class LayerUse:
    """Bytes of one entry of the cache list; `heads` has those of each KV head.

    Attributes:
        fp16: what the same tokens take at two bytes an element.
        compressed: whether it is a compressed cache.
    """

    compressed: bool
    used: int
    fp16: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The KV cache at one moment. Bytes are counted from its buffers.

    Attributes:
        request: the reply it belongs to, 0 between replies.
        tokens: tokens in the cache.
        fp16: what they take at two bytes an element.
        codes, scales, tables, exact, centers: parts of the compressed cache; `exact` are the
            first and the most recent tokens, `tables` say where a token is and what it is worth.
        other: caches that are not compressed (sliding windows, or all of them).
        allocated: what the buffers hold, unused space included.
        process_peak: highest memory use of mlx in this process.
        context_left: tokens that still fit the budget and the model.
        speed: tokens of the reply per second, 0 outside of a reply.
        layers: bytes per entry of the cache list.
        values_read: share of the stored values that the last token read; below 1 with skip= only.
        weights_read: share of the bytes of the layers' weights that the last step read; below 1
            with sparse= only.
        exact_until: tokens up to which the compressed caches keep every token as it is; 0 if no
            cache is compressed.
    """

    request: int
    tokens: int
    fp16: int
    codes: int
    scales: int
    tables: int
    exact: int
    centers: int
    other: int
    allocated: int
    process_peak: int
    context_left: int
    speed: float
    layers: tuple[LayerUse, ...] = ()
    values_read: float = 1.0
    weights_read: float = 1.0
    exact_until: int = 0

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self.codes + self.scales + self.tables + self.exact + self.centers + self.other

    @property
    def ratio(self) -> float:
        """How many times smaller than fp16; 1.0 for an empty cache."""
        return self.fp16 / self.used if self.used else 1.0


@dataclass(frozen=True, slots=True)
class Done:
    """A reply is complete.

    Attributes:
        reason: "stop" the model ended it, "length" it reached its limit.
        reused: prompt tokens that were in the cache.
    """

    request: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    reused: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """A reply was stopped; the cache is consistent and the conversation can go on. Or a load
    (stage "load", request 0): the model before it stays."""

    request: int
    stage: Stage
    tokens: int


@dataclass(frozen=True, slots=True)
class Recoded:
    """The compression of the session changed.

    Attributes:
        reread: the cache could not be turned into this setting (more bits than it has); it was
            dropped, and the conversation is read again with the next message.
        before, after: bytes in use.
    """

    kv: str
    backend: str
    compressed: int
    reread: bool
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request could not be served. `request` is 0 if it was not a reply."""

    request: int
    kind: Literal["load", "reply", "kv"]
    message: str


@dataclass(frozen=True, slots=True)
class Noted:
    """Something the user should know that stops nothing, for example that a document could not be
    kept for the next time."""

    text: str


Event = (
    Loading | Downloading | Loaded | Prefill | Text | Snapshot | Done | Stopped | Recoded | Failed
    | Noted
)  # fmt: skip
EVENTS: tuple[type[Event], ...] = (
    Loading, Downloading, Loaded, Prefill, Text, Snapshot, Done, Stopped, Recoded, Failed, Noted,
)  # fmt: skip
