"""A setting of the `--kv` text, `name=value`: read, written and checked by the type of its field.

Configuration and its parts (policies, scorers) are frozen dataclasses: names, types and defaults of
their fields are all that their text form needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from leankv_mlx.errors import ConfigError, UsageError
from leankv_mlx.sizes import parse_bytes

BITS = (2, 3, 4, 8)
BLOCK_SLOTS = 32
"""Tokens per block, and the number of rows that leave the window at a time."""

Bits = tuple[int, int]
"""Of keys and of values."""
Groups = int | tuple[int, ...]
"""Bits per element of one side; or one number per group of 32 channels of the (padded) head_dim,
where 0 stores nothing of that group."""
LowBits = Bits | Literal["auto", "none"]
Size = Annotated[int, "bytes"]

NAME_FORM = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Names of profiles and calibrations."""
_DIGEST = re.compile(r"[0-9a-f]{8}")
BITS_FORM = re.compile(r"k(\d+)v(\d+)")

MOST_SPARSE = 0.9
"""Largest share of channels that is left out."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """Which share of the weights' input channels a decode step leaves out, and by whose thresholds.

    Attributes:
        share: 0 to `MOST_SPARSE`.
        name: of the calibration; "" for the latest of the model.
    """

    share: float = 0.0
    name: str = ""

    def __str__(self) -> str:
        return _short(self.share) + (f"@{self.name}" if self.name else "")

    def __bool__(self) -> bool:
        return self.share > 0


@dataclass(frozen=True, slots=True)
class Named:
    """Something that was learned for a model, a mask or a basis.

    Attributes:
        name: what it is called; "" for none.
        digest: of its content, 8 hex digits, so that what was stored with one of them is never read
            with another of the same name; "" for whatever has the name.
    """

    name: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return self.name + (f"@{self.digest}" if self.digest else "")

    def __bool__(self) -> bool:
        return bool(self.name)


_FOUND: dict[type[Any], dict[str, Setting]] = {}  # looking at types takes long


@dataclass(frozen=True, slots=True)
class Setting:
    """A name that may stand in the text; `kind` is the type of its values, `str` for a name that
    stands for an object."""

    name: str
    kind: Any
    default: Any

    def read(self, text: str) -> Any:
        """The value of a text; words of a Literal are checked where they are used.

        Raises:
            ConfigError: it is not understood.
        """
        word = self.kind is str or get_origin(self.kind) is Literal
        return text if word else _READERS[self.kind](self.name, text)

    def text(self, value: Any) -> str:
        """What `read` takes."""
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, float):
            return _short(value)
        if isinstance(value, tuple) and self.kind == Groups:
            return ".".join(map(str, value))
        if isinstance(value, tuple):
            pairs = value if isinstance(value[0], tuple) else (value,)
            return "/".join(f"k{k}v{v}" for k, v in pairs)
        return str(value)


def settings_of(part: type[Any]) -> dict[str, Setting]:
    """The fields of a dataclass, in order, by name."""
    if part not in _FOUND:
        kinds = get_type_hints(part, include_extras=True)
        _FOUND[part] = {f.name: Setting(f.name, kinds[f.name], f.default) for f in fields(part)}
    return _FOUND[part]


def check_words(part: Any) -> None:
    """Whether every field of a Literal type holds one of its words.

    Raises:
        ConfigError: one holds another.
    """
    for name, setting in settings_of(type(part)).items():
        words = get_args(setting.kind) if get_origin(setting.kind) is Literal else ()
        if words and getattr(part, name) not in words:
            raise ConfigError(
                f"{name}={getattr(part, name)} is unknown; use one of {', '.join(words)}."
            )


def check_bits(k_bits: Groups, v_bits: Groups) -> None:
    """Whether keys and values can be stored in so many bits.

    Raises:
        ConfigError: they cannot.
    """
    for side, bits in (("k", k_bits), ("v", v_bits)):
        groups = bits if isinstance(bits, tuple) else (bits,)
        allowed = (0, *BITS) if isinstance(bits, tuple) else BITS
        if not groups or any(type(b) is not int or b not in allowed for b in groups):
            raise ConfigError(
                f"{side}_bits={bits} is not supported; use {', '.join(map(str, BITS))}."
            )
        if not any(groups):
            raise ConfigError(f"{side}_bits={bits} stores nothing; give one group at least 2 bits.")


def check_low(low: LowBits) -> None:
    """Whether bits of a low tier make sense.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(low, str):
        check_bits(*low)
    elif low not in ("auto", "none"):
        raise ConfigError(f"low={low} is not understood; use kNvM, auto or none.")


def check_sparse(sparse: Sparse) -> None:
    """Whether so much can be left out.

    Raises:
        ConfigError: it cannot.
    """
    if not 0 <= sparse.share <= MOST_SPARSE:
        raise ConfigError(
            f"sparse={sparse} is out of range; use a share from 0 to {MOST_SPARSE}, such as 0.25."
        )
    if sparse.name and not NAME_FORM.fullmatch(sparse.name):
        raise ConfigError(f"sparse={sparse} names no calibration; use letters, digits, - and _.")


def check_named(setting: str, value: Named) -> None:
    """Whether a mask or a basis can be called so.

    Raises:
        ConfigError: it cannot.
    """
    digest = not value.digest or _DIGEST.fullmatch(value.digest)
    if (value.name or value.digest) and not (NAME_FORM.fullmatch(value.name) and digest):
        raise ConfigError(f"{setting}={value} names no {setting}; use letters, digits, - and _.")


def _short(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a whole number.") from None


def _switch(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"{name}={text} is not understood; use on or off.")
    return text == "on"


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a number.") from None


def _sparse(name: str, text: str) -> Sparse:
    share, _, calibration = text.partition("@")
    share = share.strip()
    if share.endswith("%"):
        return Sparse(_number(name, share[:-1]) / 100, calibration.strip())
    return Sparse(_number(name, share), calibration.strip())


def _named(name: str, text: str) -> Named:
    called, at, digest = (part.strip() for part in text.partition("@"))
    if not called or (at and not digest):
        raise ConfigError(f"{name}={text} names no {name}; use the name of one, or drop it.")
    return Named(called, digest)


def _size(name: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise ConfigError(f"{name}={text}: {error}") from None


def _groups(name: str, text: str) -> Groups:
    groups = tuple(_integer(name, part) for part in text.split("."))
    return groups if len(groups) > 1 else groups[0]


def _pair(name: str, text: str) -> Bits:
    match = BITS_FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{name}={text} is not understood; use kNvM, for example k3v2.")
    return int(match[1]), int(match[2])


def _low(name: str, text: str) -> Bits | str:
    return text if text in ("auto", "none") else _pair(name, text)


def _layers(name: str, text: str) -> tuple[Bits, ...]:
    return tuple(_pair(name, part) for part in text.split("/"))


_READERS: dict[Any, Callable[[str, str], Any]] = {
    bool: _switch,
    int: _integer,
    float: _number,
    Size: _size,
    Groups: _groups,
    LowBits: _low,
    Sparse: _sparse,
    Named: _named,
    tuple[Bits, ...]: _layers,
}
