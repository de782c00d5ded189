"""What to compress and how: `CompressionConfig` and its text form, the `--kv` SPEC."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.profiles import profiles
from leankv_mlx.sizes import parse_bytes

Rounding = Literal["search", "rms", "optimal"]
BackendName = Literal["auto", "metal", "cuda", "cpu", "reference"]
PolicyName = Literal["keep_all", "threshold", "budget", "streaming"]
When = Literal["prompt", "chunk"]
Scores = Literal["queries", "repeat"]
Scope = Literal["layer", "model"]
RotationName = Literal["hadamard", "none"]

BITS = (2, 3, 4, 8)
BLOCK_SLOTS = 32
"""Tokens per block, and the number of rows that leave the window at a time."""

Bits = tuple[int, int]
"""Of keys and of values."""

_BITS_RE = re.compile(r"k(\d+)v(\d+)")
_STEP_DOWN = {8: 4, 4: 3, 3: 2, 2: 2}, {8: 4, 4: 2, 3: 2, 2: 2}
"""Bits of keys and of values in the low tier, from those of the high one: k8v4 -> k4v2 as in the
LeanKV paper, k4v4 -> k3v2."""


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """How one cache compresses its keys and values.

    Attributes:
        k_bits: bits per key element, one of 2, 3, 4, 8; or one number per group of 32 channels
            of the (padded) head_dim, where 0 stores nothing of that group.
        v_bits: the same for values.
        sink_tokens: first tokens of a sequence that stay uncompressed.
        window: most recent tokens that stay uncompressed, at least 32.
        rounding: how the scale of a vector is found: "search" (scale search with least
            squares), "rms", or "optimal" (coordinate descent over the codes).
        rotation: "hadamard" spreads the energy of a vector over its channels before encoding;
            "none" shows what that is worth.
        center: subtract the mean of the first body tokens before encoding (exact, see
            `kernels.types.Centers`).
        equalize: also scale the channels of the keys before encoding, and those of the queries by
            the inverse (exact too, see `codec.equalize`).
        policy: which tokens are kept, see `sparsity.policies`; "keep_all" keeps every token.
        low: bits of the low tier, or "none" for a single tier; "auto" is a step below k_bits and
            v_bits for policy=threshold, and no low tier for the others.
        alpha_high: policy=threshold: above alpha_high / N a token stays in the high tier.
        alpha_low: and above alpha_low / N in the low one.
        ratio: policy=budget: bytes of an uncompressed fp16 cache over those that may stay.
        budget: policy=budget: bytes of all compressed layers together, for whatever is generated,
            and for a prompt that nobody tells the length of; 0 for no such limit.
        high: policy=budget: share of the bytes for the high tier, if there is a low one.
        scope: policy=budget: whether the heads of a layer or of the model share its bytes.
        at: when tokens are dropped: once the "prompt" is in, or also after each "chunk" of it.
        scores: what tokens are judged by: the last "queries" of the prompt, or, for a document
            that will be asked many things, a pass in which the model is made to "repeat" it.
        pooling: tokens, an odd number: a score is the largest among so many neighbours.
        skip: attention weight below which a token's value may be taken for its center, see
            `kernels.decode_attention`; 0 reads all of them.
        layer_bits: bits of each layer in place of k_bits and v_bits; () for all alike.
        backend: which implementation runs the kernels; "auto" takes the best one present.

    Raises:
        ConfigError: a value is out of range.
    """

    k_bits: int | tuple[int, ...] = 4
    v_bits: int | tuple[int, ...] = 4
    sink_tokens: int = 4
    window: int = 64
    rounding: Rounding = "search"
    rotation: RotationName = "hadamard"
    center: bool = True
    equalize: bool = True
    policy: PolicyName = "keep_all"
    low: Bits | Literal["auto", "none"] = "auto"
    alpha_high: float = 1.0
    alpha_low: float = 0.05
    ratio: float = 8.0
    budget: int = 0
    high: float = 0.5
    scope: Scope = "layer"
    at: When = "prompt"
    scores: Scores = "queries"
    pooling: int = 31
    skip: float = 0.0
    layer_bits: tuple[Bits, ...] = ()
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        low = () if isinstance(self.low, str) else (self.low,)
        for k_bits, v_bits in ((self.k_bits, self.v_bits), *low, *self.layer_bits):
            _check_bits("k", k_bits)
            _check_bits("v", v_bits)
        if isinstance(self.low, str) and self.low not in ("auto", "none"):
            raise ConfigError(f"low={self.low} is not understood; use kNvM, auto or none.")
        self._check_policy()
        if self.window < BLOCK_SLOTS:
            raise ConfigError(f"window={self.window} is too small; use at least {BLOCK_SLOTS}.")
        if not 0 <= self.sink_tokens <= 128:
            raise ConfigError(f"sink_tokens={self.sink_tokens} is out of range; use 0 to 128.")
        for name, kind in (
            ("rounding", Rounding),
            ("rotation", RotationName),
            ("policy", PolicyName),
            ("at", When),
            ("scores", Scores),
            ("scope", Scope),
            ("backend", BackendName),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ConfigError(f"{name}={getattr(self, name)} is unknown; use one of {choices}.")

    def _check_policy(self) -> None:
        if not 0 <= self.alpha_low <= self.alpha_high < math.inf:
            raise ConfigError(
                f"alpha_low={self.alpha_low:g} and alpha_high={self.alpha_high:g} make no sense; "
                "use 0 <= alpha_low <= alpha_high."
            )
        if not 1 < self.ratio < math.inf:
            raise ConfigError(f"ratio={self.ratio:g} is out of range; use a number above 1.")
        if not 0 <= self.high <= 1:
            raise ConfigError(f"high={self.high:g} is out of range; use 0 to 1.")
        if self.budget < 0:
            raise ConfigError(f"budget={self.budget} is out of range; use bytes, for example 64MB.")
        if not 0 <= self.skip < 1:
            raise ConfigError(f"skip={self.skip:g} is no attention weight; use 0, or 0.001.")
        if not 1 <= self.pooling <= 255 or self.pooling % 2 == 0:
            raise ConfigError(f"pooling={self.pooling} is out of range; use an odd number to 255.")

    @property
    def tiers(self) -> tuple[tuple[int | tuple[int, ...], int | tuple[int, ...]], ...]:
        """Bits of keys and values of the high tier, and of the low one if there is one."""
        high = self.k_bits, self.v_bits
        if self.policy == "keep_all" or self.low == "none":
            return (high,)
        if isinstance(self.low, tuple):
            return high, self.low
        if self.policy != "threshold":
            return (high,)
        k, v = (_stepped(bits, down) for bits, down in zip(high, _STEP_DOWN, strict=True))
        return high, (k, v)

    def for_layer(self, index: int, layers: int) -> "CompressionConfig":
        """The settings of one of the compressed layers of a model.

        Raises:
            ConfigError: layer_bits is for a model with another number of them.
        """
        if not self.layer_bits:
            return self
        if len(self.layer_bits) != layers:
            raise ConfigError(
                f"layer_bits names {len(self.layer_bits)} layers, but this model has {layers} that "
                "are compressed; use a profile that was calibrated for it (leankv calibrate)."
            )
        k_bits, v_bits = self.layer_bits[index]
        return replace(self, k_bits=k_bits, v_bits=v_bits, layer_bits=())

    @classmethod
    def parse(cls, text: str, stored: bool = False) -> "CompressionConfig":
        """Read the value of `--kv`: `leankv`, or settings with commas between; `leankv:` may stand
        in front of them.

        A setting is `kNvM` (bits), `name=value`, or the name of a profile in models.toml;
        later settings win.

        Args:
            stored: the text comes from a file. Then a setting that does nothing beside the others
                is passed over; somebody who gives it now is told.

        Raises:
            ConfigError: the text is not understood, or one of its settings does nothing.
        """
        head, colon, rest = text.strip().partition(":")
        if head != "leankv" and not colon and head:
            rest = head
        elif head != "leankv":
            raise ConfigError(
                f"unknown KV setting '{text}'; use leankv, a profile, or leankv:SPEC such as "
                "leankv:k4v3."
            )
        config = cls(**_fields(rest))
        if not stored:
            _check_idle(config, rest)
        return config

    def spec(self) -> str:
        """The text form that `parse` reads back to an equal config."""
        default = CompressionConfig()
        parts = []
        if isinstance(self.k_bits, int) and isinstance(self.v_bits, int):
            parts.append(f"k{self.k_bits}v{self.v_bits}")
        else:
            parts += [f"k_bits={_join(self.k_bits)}", f"v_bits={_join(self.v_bits)}"]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != getattr(default, field.name):
                parts.append(f"{field.name}={_text(value)}")
        return "leankv:" + ",".join(parts)


UNCOMPRESSED = "none"
"""The value of `--kv` for mlx-lm's own cache."""


def parse_kv(text: str, stored: bool = False) -> CompressionConfig | None:
    """The value of `--kv`: `UNCOMPRESSED`, which is None, or what `CompressionConfig.parse` reads.

    Raises:
        ConfigError: it is not understood, see there.
    """
    text = text.strip()
    return None if text == UNCOMPRESSED else CompressionConfig.parse(text, stored)


def kv_text(config: CompressionConfig | None) -> str:
    """The text that `parse_kv` reads back."""
    return UNCOMPRESSED if config is None else config.spec()


def _check_bits(side: str, bits: int | tuple[int, ...]) -> None:
    groups = bits if isinstance(bits, tuple) else (bits,)
    allowed = (0, *BITS) if isinstance(bits, tuple) else BITS
    if not groups or any(type(b) is not int or b not in allowed for b in groups):
        raise ConfigError(f"{side}_bits={bits} is not supported; use {', '.join(map(str, BITS))}.")
    if not any(groups):
        raise ConfigError(f"{side}_bits={bits} stores nothing; give one group at least 2 bits.")


def _fields(settings: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """What comma-separated settings set. They are checked together, so their order is free.

    Args:
        inside: the profiles whose settings these are.
    """
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in settings.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if match := _BITS_RE.fullmatch(item):
            found |= {"k_bits": int(match[1]), "v_bits": int(match[2])}
        elif not equals:
            if name in inside:
                raise ConfigError(f"the profile '{name}' names itself; mend it in your profiles.")
            found |= _fields(_profile(name), (*inside, name))
        elif name in _READERS:
            found[name] = _READERS[name](name, value)
        else:
            raise ConfigError(f"unknown KV setting '{name}'; known are {', '.join(_READERS)}.")
    return found


def _check_idle(config: CompressionConfig, settings: str) -> None:
    """Whether all that was given does something; what a profile says need not.

    Raises:
        ConfigError: a setting does nothing.
    """
    for item in (part.strip() for part in settings.split(",")):
        name, equals, _ = (part.strip() for part in item.partition("="))
        policies, low = _NEEDS.get(name, ((), False)) if equals else ((), False)
        if policies and config.policy not in policies:
            use = " or ".join(f"policy={policy}" for policy in policies)
            raise ConfigError(
                f"{item} does nothing with policy={config.policy}; use {use}, or drop it."
            )
        if low and len(config.tiers) == 1:
            raise ConfigError(f"{item} does nothing without a low tier; add low=k3v2, or drop it.")


def _profile(name: str) -> str:
    named = profiles()
    if name not in named:
        known = ", ".join(sorted(named))
        raise ConfigError(
            f"unknown KV setting '{name}'; use kNvM, name=value or a profile ({known})."
        )
    return named[name]


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value} is not a whole number.") from None


def _switch(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError(f"{name}={value} is not understood; use on or off.")
    return value == "on"


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name}={value} is not a number.") from None


def _size(name: str, value: str) -> int:
    try:
        return parse_bytes(value)
    except UsageError as error:
        raise ConfigError(f"{name}={value}: {error}") from None


def _groups(name: str, value: str) -> int | tuple[int, ...]:
    groups = tuple(_integer(name, part) for part in value.split("."))
    return groups if len(groups) > 1 else groups[0]


def _pair(name: str, value: str) -> Bits:
    match = _BITS_RE.fullmatch(value)
    if match is None:
        raise ConfigError(f"{name}={value} is not understood; use kNvM, for example k3v2.")
    return int(match[1]), int(match[2])


def _low(name: str, value: str) -> Bits | str:
    return value if value in ("auto", "none") else _pair(name, value)


def _layers(name: str, value: str) -> tuple[Bits, ...]:
    return tuple(_pair(name, part) for part in value.split("/"))


def _word(name: str, value: str) -> str:
    return value


_READERS: dict[str, Callable[[str, str], Any]] = {
    "k_bits": _groups,
    "v_bits": _groups,
    "sink_tokens": _integer,
    "window": _integer,
    "rounding": _word,
    "rotation": _word,
    "center": _switch,
    "equalize": _switch,
    "policy": _word,
    "low": _low,
    "alpha_high": _number,
    "alpha_low": _number,
    "ratio": _number,
    "budget": _size,
    "high": _number,
    "scope": _word,
    "at": _word,
    "scores": _word,
    "pooling": _integer,
    "skip": _number,
    "layer_bits": _layers,
    "backend": _word,
}


_JUDGED: tuple[PolicyName, ...] = ("budget", "threshold")
_DROPPING: tuple[PolicyName, ...] = (*_JUDGED, "streaming")

_NEEDS: dict[str, tuple[tuple[PolicyName, ...], bool]] = {
    "low": (_JUDGED, False),
    "alpha_high": (("threshold",), False),
    "alpha_low": (("threshold",), False),
    "ratio": (("budget",), False),
    "budget": (("budget",), False),
    "high": (("budget",), True),
    "scope": (("budget",), False),
    "at": (_DROPPING, False),
    "scores": (_DROPPING, False),
    "pooling": (_JUDGED, False),
}
"""The policies that read a setting, and whether it needs a low tier."""


def _stepped(bits: int | tuple[int, ...], down: dict[int, int]) -> int | tuple[int, ...]:
    if isinstance(bits, int):
        return down[bits]
    return tuple(down.get(group, 0) for group in bits)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, tuple):
        pairs = value if isinstance(value[0], tuple) else (value,)
        return "/".join(f"k{k}v{v}" for k, v in pairs)
    return str(value)


def _join(bits: int | tuple[int, ...]) -> str:
    return ".".join(map(str, bits)) if isinstance(bits, tuple) else str(bits)
