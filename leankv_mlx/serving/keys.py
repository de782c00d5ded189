"""What names the file of an entry: everything that its content depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from leankv_mlx import __version__
from leankv_mlx.cache import container
from leankv_mlx.config import CompressionConfig, kv_text
from leankv_mlx.errors import ConfigError

_NAME = re.compile(r"[0-9a-f]{32}(?:-([1-9][0-9]{0,8}))?")
"""A digest and the number of tokens; earlier releases named entries by the digest alone."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How tokens become caches: everything that an entry depends on besides them.

    Attributes:
        model: what tells the model and its weights from others.
        kv: the setting, see `kv_name`.
        chunk: tokens that were read at a time.
    """

    model: str
    kv: str
    chunk: int

    def digests(self, tokens: Sequence[int], lengths: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Lengths of a sequence, ascending, and the digests of the tokens up to there."""
        fields = [__version__, container.VERSION, self.model, self.kv, self.chunk]
        digest = hashlib.blake2b(f"{json.dumps(fields)[:-1]}, [".encode(), digest_size=16)
        done = 0
        for length in sorted(lengths):
            more = ", ".join(map(str, tokens[done:length]))
            digest.update((", " + more if done and more else more).encode())
            done = length
            ended = digest.copy()
            ended.update(b"]]")
            yield length, ended.hexdigest()


@dataclass(frozen=True, slots=True)
class Key:
    """Everything that the caches of a prefix depend on.

    Attributes:
        model, kv, chunk: see `Reading`.
        prefix: the tokens; of a document its text, the template and the tokenizer are in them.
    """

    model: str
    kv: str
    prefix: tuple[int, ...]
    chunk: int

    @property
    def digest(self) -> str:
        """32 hex digits."""
        reading = Reading(self.model, self.kv, self.chunk)
        ((_, digest),) = reading.digests(self.prefix, [len(self.prefix)])
        return digest


def kv_name(config: CompressionConfig | None) -> str:
    """The setting as a key has it: "none" for the uncompressed cache, and what computes it is no
    part of it.

    Raises:
        ConfigError: its mask or basis has no digest, so that another one may have the name later.
    """
    for setting in ("mask", "basis") if config is not None else ():
        if (value := getattr(config, setting)) and not value.digest:
            raise ConfigError(
                f"{setting}={value} names nothing that is stored; use the settings of an "
                "attachment, which have its digest."
            )
    return kv_text(None if config is None else config.portable)


def name_of(digest: str, tokens: int) -> str:
    """The name of an entry of so many tokens."""
    return f"{digest}-{tokens}"


def tokens_in(name: str) -> int | None:
    """How many tokens an entry with this name has; None if the name does not say."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found and found[1] else None


def is_ours(name: str) -> bool:
    """Whether an entry has such a name as is given here; others are the user's own files."""
    return _NAME.fullmatch(name) is not None
