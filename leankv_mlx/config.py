"""What to compress and how: `CompressionConfig` and its text form, the `--kv` SPEC."""

import re
import tomllib
from dataclasses import dataclass, fields, replace
from typing import Literal, cast, get_args

from leankv_mlx.errors import ConfigError
from leankv_mlx.resources import models_toml

Rounding = Literal["search", "rms", "optimal"]
BackendName = Literal["auto", "metal", "cuda", "cpu", "reference"]
PolicyName = Literal["keep_all"]
RotationName = Literal["hadamard", "none"]

BITS = (2, 3, 4, 8)
BLOCK_SLOTS = 32
"""Tokens per block, and the number of rows that leave the window at a time."""

_BITS_RE = re.compile(r"k(\d+)v(\d+)")


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
        equalize: also divide unusually large key channels before encoding, and multiply the same
            channels of the queries (exact too).
        policy: which tokens are kept; "keep_all" keeps every token.
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
    equalize: bool = False
    policy: PolicyName = "keep_all"
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        for side, bits in (("k", self.k_bits), ("v", self.v_bits)):
            _check_bits(side, bits)
        if self.window < BLOCK_SLOTS:
            raise ConfigError(f"window={self.window} is too small; use at least {BLOCK_SLOTS}.")
        if not 0 <= self.sink_tokens <= 128:
            raise ConfigError(f"sink_tokens={self.sink_tokens} is out of range; use 0 to 128.")
        for name, kind in (
            ("rounding", Rounding),
            ("rotation", RotationName),
            ("policy", PolicyName),
            ("backend", BackendName),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ConfigError(f"{name}={getattr(self, name)} is unknown; use one of {choices}.")

    @classmethod
    def parse(cls, text: str) -> "CompressionConfig":
        """Read the value of `--kv`: `leankv`, or `leankv:` and comma-separated settings.

        A setting is `kNvM` (bits), `name=value`, or the name of a profile in models.toml;
        later settings win.

        Raises:
            ConfigError: the text is not understood.
        """
        head, _, rest = text.strip().partition(":")
        if head != "leankv":
            raise ConfigError(
                f"unknown KV setting '{text}'; use leankv or leankv:SPEC, for example leankv:k4v3."
            )
        config = cls()
        for item in filter(None, (part.strip() for part in rest.split(","))):
            config = _apply(config, item)
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


def profiles() -> dict[str, str]:
    """Named settings from models.toml: profile name -> SPEC."""
    with models_toml().open("rb") as file:
        return {name: row["kv"] for name, row in tomllib.load(file)["profiles"].items()}


def _check_bits(side: str, bits: int | tuple[int, ...]) -> None:
    groups = bits if isinstance(bits, tuple) else (bits,)
    allowed = (0, *BITS) if isinstance(bits, tuple) else BITS
    if not groups or any(type(b) is not int or b not in allowed for b in groups):
        raise ConfigError(f"{side}_bits={bits} is not supported; use {', '.join(map(str, BITS))}.")
    if not any(groups):
        raise ConfigError(f"{side}_bits={bits} stores nothing; give one group at least 2 bits.")


def _apply(config: CompressionConfig, item: str) -> CompressionConfig:
    if match := _BITS_RE.fullmatch(item):
        return replace(config, k_bits=int(match[1]), v_bits=int(match[2]))
    name, equals, value = item.partition("=")
    if not equals:
        named = profiles()
        if name not in named:
            known = ", ".join(sorted(named))
            raise ConfigError(
                f"unknown KV setting '{name}'; use kNvM, name=value or a profile ({known})."
            )
        for part in named[name].split(","):
            config = _apply(config, part)
        return config
    name, value = name.strip(), value.strip()
    if name in ("k_bits", "v_bits"):
        groups = tuple(_integer(name, part) for part in value.split("."))
        bits = groups if len(groups) > 1 else groups[0]
        return replace(config, k_bits=bits) if name == "k_bits" else replace(config, v_bits=bits)
    if name == "sink_tokens":
        return replace(config, sink_tokens=_integer(name, value))
    if name == "window":
        return replace(config, window=_integer(name, value))
    if name == "rounding":
        return replace(config, rounding=cast(Rounding, value))
    if name == "rotation":
        return replace(config, rotation=cast(RotationName, value))
    if name == "center":
        return replace(config, center=_switch(name, value))
    if name == "equalize":
        return replace(config, equalize=_switch(name, value))
    if name == "policy":
        return replace(config, policy=cast(PolicyName, value))
    if name == "backend":
        return replace(config, backend=cast(BackendName, value))
    known = ", ".join(field.name for field in fields(config))
    raise ConfigError(f"unknown KV setting '{name}'; known are {known}.")


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value} is not a whole number.") from None


def _switch(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError(f"{name}={value} is not understood; use on or off.")
    return value == "on"


def _text(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _join(bits: int | tuple[int, ...]) -> str:
    return ".".join(map(str, bits)) if isinstance(bits, tuple) else str(bits)
