"""What to compress and how: `CompressionConfig` and its text form, the `--kv` SPEC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from leankv_mlx.errors import ConfigError
from leankv_mlx.policies import POLICIES, Dropping, KeepAll, Policy
from leankv_mlx.profiles import profiles
from leankv_mlx.scorers import SCORERS, Queries, Scorer
from leankv_mlx.settings import (
    BITS_FORM,
    BLOCK_SLOTS,
    Bits,
    Groups,
    Named,
    Setting,
    Sparse,
    check_bits,
    check_named,
    check_sparse,
    check_words,
    settings_of,
)

Rounding = Literal["search", "rms", "optimal"]
BackendName = Literal["auto", "metal", "cuda", "cpu", "reference"]
Products = Literal["auto", "native", "mlx"]
RotationName = Literal["hadamard", "none"]

_CHOICES: dict[str, tuple[str, Mapping[str, type[Any]], type[Any]]] = {
    "policy": ("policy", POLICIES, Dropping),
    "scorer": ("scores", SCORERS, Scorer),
}
"""Fields that hold an object: the setting that chooses it by its name, what from, and whose
settings stand behind those of all the others in the text form: the class that those share."""


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
        mask: which key channels codes keep once the prompt is in, by a mask that was learned for
            the model; "" for all, see `codec.channels`.
        basis: what keys are multiplied by before the rotation, and queries by the inverse, in place
            of `equalize`: a basis that was learned for the model; "" for none, see `codec.basis`.
        policy: which tokens are kept, with its own settings, see `leankv_mlx.policies`.
        scorer: what tokens are judged by, see `leankv_mlx.scorers`.
        skip: attention weight below which a token's value may be taken for its center, see
            `kernels.decode_attention`; 0 reads all of them.
        sparse: share of the input channels of the model's products that a decode step leaves out,
            see `projections.sparsity`.
        layer_bits: bits of each layer in place of k_bits and v_bits; () for all alike.
        backend: which implementation runs the kernels; "auto" takes the best one present.
        projections: what multiplies quantized weights: "native" products, "mlx" for MLX's own, or
            "auto": native ones on a CPU that has them.
        idle: names and values that a profile or a file gave and that another policy would read.
            They do nothing, but the text form keeps them, because it names what was stored.

    Raises:
        ConfigError: a value is out of range.
    """

    k_bits: Groups = 4
    v_bits: Groups = 4
    sink_tokens: int = 4
    window: int = 64
    rounding: Rounding = "search"
    rotation: RotationName = "hadamard"
    center: bool = True
    equalize: bool = True
    mask: Named = field(default=Named())
    basis: Named = field(default=Named())
    policy: Policy = field(default=KeepAll())
    scorer: Scorer = field(default=Queries())
    skip: float = 0.0
    sparse: Sparse = field(default=Sparse())
    layer_bits: tuple[Bits, ...] = ()
    backend: BackendName = "auto"
    projections: Products = "auto"
    idle: tuple[tuple[str, Any], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for k_bits, v_bits in ((self.k_bits, self.v_bits), *self.layer_bits):
            check_bits(k_bits, v_bits)
        for name, (_, table, _) in _CHOICES.items():
            if type(getattr(self, name)) not in table.values():
                names = ", ".join(part.__name__ for part in table.values())
                raise ConfigError(f"{name}={getattr(self, name)!r} is no {name}; use {names}.")
        if self.window < BLOCK_SLOTS:
            raise ConfigError(f"window={self.window} is too small; use at least {BLOCK_SLOTS}.")
        if not 0 <= self.sink_tokens <= 128:
            raise ConfigError(f"sink_tokens={self.sink_tokens} is out of range; use 0 to 128.")
        if not 0 <= self.skip < 1:
            raise ConfigError(f"skip={self.skip:g} is no attention weight; use 0, or 0.001.")
        check_sparse(self.sparse)
        check_named("mask", self.mask)
        check_named("basis", self.basis)
        if self.mask and self.basis:
            raise ConfigError(
                f"mask={self.mask} and basis={self.basis} do not go together; drop one of them."
            )
        check_words(self)

    @property
    def settles(self) -> bool:
        """Whether something of a prompt goes once it is in: tokens by the policy, or key channels
        by the mask."""
        return self.policy.drops or bool(self.mask)

    @property
    def equalizes(self) -> bool:
        """Whether the channels of the keys are scaled: a basis does more than that."""
        return self.equalize and not self.basis

    @property
    def tiers(self) -> tuple[tuple[Groups, Groups], ...]:
        """Bits of keys and values of the high tier, and of the low one if there is one."""
        low = self.policy.low_tier(self.k_bits, self.v_bits)
        high = self.k_bits, self.v_bits
        return (high,) if low is None else (high, low)

    @property
    def portable(self) -> CompressionConfig:
        """The settings without those that change how a cache is computed, or the model that fills
        it, and not what is in it: no part of what is stored."""
        return replace(self, backend="auto", projections="auto", sparse=Sparse())

    def for_layer(self, index: int, layers: int) -> CompressionConfig:
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
    def parse(cls, text: str, stored: bool = False) -> CompressionConfig:
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
        config = _made(_values(rest))
        if not stored:
            _check_idle(config, rest)
        return config

    def spec(self) -> str:
        """The text form that `parse` reads back to an equal config."""
        values = dict(self.idle) | _fields(self) | _fields(self.policy) | _fields(self.scorer)
        values |= {"policy": self.policy.name, "scores": self.scorer.name}
        k, v = (values.pop(name) for name in ("k_bits", "v_bits"))
        known = _known()
        parts = [f"k{k}v{v}"]
        if not isinstance(k, int) or not isinstance(v, int):
            parts = [f"{n}={known[n].text(x)}" for n, x in (("k_bits", k), ("v_bits", v))]
        for name, setting in known.items():
            if name in values and values[name] != setting.default:
                parts.append(f"{name}={setting.text(values[name])}")
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


def _known() -> dict[str, Setting]:
    """Every setting by its name, in the order of the text form. A name means the same in all
    policies that have it."""
    found: dict[str, Setting] = {}
    for name, setting in settings_of(CompressionConfig).items():
        if name in _CHOICES:
            word, table, base = _CHOICES[name]
            found[word] = Setting(word, str, setting.default.name)
            shared = settings_of(base)
            for part in table.values():
                own = settings_of(part).items()
                found |= {n: s for n, s in own if n not in found and n not in shared}
            found |= shared
        elif name != "idle":
            found[name] = setting
    return found


def _fields(part: Any) -> dict[str, Any]:
    return {name: getattr(part, name) for name in settings_of(type(part))}


def _items(settings: str) -> Iterator[tuple[str, str, str, str]]:
    """Each of comma-separated settings: all of it, its name, "=" if it has a value, the value."""
    for item in filter(None, (part.strip() for part in settings.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        yield item, name, equals, value


def _values(settings: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """What comma-separated settings set. They are checked together, so their order is free.

    Args:
        inside: the profiles whose settings these are.
    """
    found: dict[str, Any] = {}
    known = _known()
    for item, name, equals, value in _items(settings):
        if match := BITS_FORM.fullmatch(item):
            found |= {"k_bits": int(match[1]), "v_bits": int(match[2])}
        elif not equals:
            if name in inside:
                raise ConfigError(f"the profile '{name}' names itself; mend it in your profiles.")
            found |= _values(_profile(name), (*inside, name))
        elif name in known:
            found[name] = known[name].read(value)
        else:
            raise ConfigError(f"unknown KV setting '{name}'; known are {', '.join(known)}.")
    return found


def _profile(name: str) -> str:
    named = profiles()
    if name not in named:
        known = ", ".join(sorted(named))
        raise ConfigError(
            f"unknown KV setting '{name}'; use kNvM, name=value or a profile ({known})."
        )
    return named[name]


def _made(values: Mapping[str, Any]) -> CompressionConfig:
    """The configuration that has these values, by the names of their settings."""
    known = _known()
    own: dict[str, Any] = {}
    idle: dict[str, Any] = {}
    for name, setting in settings_of(CompressionConfig).items():
        if name not in _CHOICES:
            own |= {name: values[name]} if name in values else {}
            continue
        word, table, _ = _CHOICES[name]
        chosen = values.get(word, setting.default.name)
        if chosen not in table:
            raise ConfigError(f"{word}={chosen} is unknown; use one of {', '.join(table)}.")
        given = {n: values[n] for n in settings_of(table[chosen]) if n in values}
        own[name] = table[chosen](**given)
        for part in table.values():
            rest = {n: values[n] for n in settings_of(part) if n in values and n not in given}
            part(**rest)  # a wrong value is told although it does nothing
            idle |= rest
    kept = [(n, idle[n]) for n, s in known.items() if n in idle and idle[n] != s.default]
    return CompressionConfig(**own, idle=tuple(kept))


def _check_idle(config: CompressionConfig, settings: str) -> None:
    """Whether all that was given does something; what a profile says need not.

    Raises:
        ConfigError: a setting does nothing.
    """
    for item, name, equals, _ in _items(settings):
        if equals and (why := _why_idle(config, name)):
            raise ConfigError(f"{item} does nothing {why}, or drop it.")


def _why_idle(config: CompressionConfig, name: str) -> str:
    """What a setting does nothing with, and what to use; "" if it does something."""
    if name == "equalize" and config.basis:
        return f"with basis={config.basis}; drop the basis"
    policies = [policy for policy in POLICIES.values() if name in settings_of(policy)]
    scorers = [scorer for scorer in SCORERS.values() if name in settings_of(scorer)]
    if not policies and scorers:
        policies = [policy for policy in POLICIES.values() if policy.scored]
    elif name == "scores":
        policies = [policy for policy in POLICIES.values() if policy.drops]
    if policies and type(config.policy) not in policies:
        use = " or ".join(f"policy={policy.name}" for policy in policies)
        return f"with policy={config.policy.name}; use {use}"
    if scorers and type(config.scorer) not in scorers:
        use = " or ".join(f"scores={scorer.name}" for scorer in scorers)
        return f"with scores={config.scorer.name}; use {use}"
    return config.policy.idle().get(name, "")
