"""Files of what was learned of the keys of a model: masks of channels, and bases.

A file is named as the setting names it, `mask=NAME` or `basis=NAME`, and says which model it is
for. It is looked for in the user's folder, then among those that ship with the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx

from leankv_mlx.cache import container
from leankv_mlx.errors import CacheFileError, CalibrationError, ConfigError
from leankv_mlx.folders import folder
from leankv_mlx.settings import NAME_FORM, Named

_SUFFIX = ".safetensors"

Tensors = dict[str, mx.array]
Content = tuple[Tensors, dict[str, str]]
"""Tensors and texts of a file."""


class Origin(NamedTuple):
    """Where something comes from: the fingerprint of its model (see `mlx_lm.loading.fingerprint`),
    what to call that, and how it came to be, by name."""

    model: str
    name: str
    notes: Mapping[str, str]


class OfModel(Protocol):
    """What was learned of the keys of one model."""

    @property
    def model(self) -> str:
        """See `Origin`."""

    @property
    def name(self) -> str:
        """See `Origin`."""

    @property
    def notes(self) -> Mapping[str, str]:
        """See `Origin`."""

    @property
    def digest(self) -> str:
        """What tells it from others, 8 hex digits."""


_Kept = TypeVar("_Kept", bound=OfModel)


@dataclass(frozen=True)
class Files(Generic[_Kept]):
    """Files of one kind.

    Attributes:
        kind: how they call themselves; what a message calls them is also their setting.
        folder: where they are among the user's own.
        command: of `leankv learn`, that makes them.
        shipped: where those of the package are, which need not exist.
        digest_of: of what the layers have.
        written: the tensors and texts of their own.
        read: what `written` was given, from those and its origin; what it does not take belongs to
            nothing. It raises ValueError (as `ConfigError` is) where they make nothing.
    """

    kind: container.Kind
    folder: str
    command: str
    shipped: Callable[[], Path]
    digest_of: Callable[[Sequence[Any]], str]
    written: Callable[[_Kept], Content]
    read: Callable[[Tensors, dict[str, str], Origin], _Kept]

    @property
    def setting(self) -> str:
        """What names one of them."""
        return self.kind.called

    def learn(self, name: str) -> str:
        """How to make one."""
        return f"leankv learn {self.command} MODEL -o {name}"

    def save(self, kept: _Kept, name: str) -> Path:
        """Write one under a name, atomically; an older file of that name is replaced.

        Raises:
            ConfigError: it cannot be called so.
            CalibrationError: it cannot be written.
            UnsupportedError: its notes are too long.
        """
        path = self._own(name)
        tensors, texts = self.written(kept)
        notes = json.dumps(dict(kept.notes))
        texts = {"model": kept.model, "name": kept.name, **texts, "notes": notes}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            container.write(path, tensors, texts, self.kind)
        except OSError as error:
            raise CalibrationError(f"cannot write {path}: {error.strerror or error}.") from error
        except CacheFileError as error:
            raise CalibrationError(str(error)) from error
        return path

    def load(self, name: str) -> _Kept:
        """That of a name, whatever model it is for.

        Raises:
            ConfigError: it cannot be called so.
            CalibrationError: there is none, or its file is damaged.
        """
        own, learn = self._own(name), f"run {self.learn(name)}"
        for path in (own, self.shipped() / own.name):
            try:
                return self._checked(*container.read(path, self.kind))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CalibrationError(f"cannot read {path}: {error.strerror or error}.") from error
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                told = isinstance(error, container.DamagedError)
                reason = str(error) if told else "it is damaged"
                raise CalibrationError(f"{path} cannot be used: {reason}; {learn}.") from error
        raise CalibrationError(f"there is no {self.setting} '{name}'; {learn}.")

    def find(self, model: str, called: str, named: Named) -> _Kept:
        """That of a model which a setting names.

        Args:
            model: its fingerprint.
            called: what to call it in a message.

        Raises:
            CalibrationError: there is none, it is damaged or of another model, or was learned anew
                since its digest was written down.
        """
        found, setting = self.load(named.name), self.setting
        if found.model != model:
            raise CalibrationError(
                f"the {setting} '{named.name}' is for {found.name}, not for {called}; "
                f"run {self.learn('NAME')} with this one."
            )
        if named.digest not in ("", found.digest):
            raise CalibrationError(
                f"{setting}={named} was learned anew since and is {named.name}@{found.digest} now; "
                f"use {setting}={named.name}@{found.digest}, or {setting}={named.name} for the "
                "latest."
            )
        return found

    def _own(self, name: str) -> Path:
        if not NAME_FORM.fullmatch(name):
            raise ConfigError(
                f"a {self.setting} cannot be called {name!r}; use letters, digits, - and _."
            )
        return folder("config") / self.folder / f"{name}{_SUFFIX}"

    def _checked(self, tensors: Tensors, texts: dict[str, str]) -> _Kept:
        """What a file says, if it can be what `save` wrote."""
        notes = json.loads(texts["notes"])
        require(isinstance(notes, dict) and all(isinstance(x, str) for x in notes.values()))
        found = self.read(tensors, texts, Origin(texts["model"], texts["name"], notes))
        require(not tensors)
        return found


def require(condition: bool) -> None:
    """Whether a file is what was written.

    Raises:
        ValueError: it is not.
    """
    if not condition:
        raise ValueError
