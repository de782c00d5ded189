"""The hyperparameters of a model in a GGUF file, each checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from leankv_mlx.models.container import FlawError

_MAX_COUNT = 1 << 31


class Facts:
    """What the metadata says about one architecture.

    Args:
        metadata: of the whole file.
        read: a small tensor of the file as float32, None if there is none of that name.
    """

    def __init__(
        self, metadata: Mapping[str, Any], read: Callable[[str], np.ndarray[Any, Any] | None]
    ) -> None:
        self._metadata = metadata
        self._read = read
        name = metadata.get("general.architecture")
        if not isinstance(name, str):
            raise FlawError("it does not say which architecture it has")
        self.architecture: str = name

    def _find(self, key: str) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}")

    def _wrong(self, key: str, value: object) -> FlawError:
        shown = "missing" if value is None else repr(value)[:80]
        return FlawError(f"{self.architecture}.{key} is {shown}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; where it is given for each layer, the same for all.

        Raises:
            FlawError: it is missing and has no default, or is anything else.
        """
        value = self._find(key)
        if value is None:
            value = default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or not 0 < value < _MAX_COUNT:
            raise self._wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number.

        Raises:
            FlawError: it is missing and has no default, or is anything else.
        """
        value = self._find(key)
        if value is None:
            value = default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(key, value)
        return float(value)

    def has(self, key: str) -> bool:
        """Whether the file says anything about it, other than 0."""
        value = self._find(key)
        return value is not None and not (type(value) in (int, float) and value == 0)

    def text(self, key: str, default: str) -> str:
        """A word.

        Raises:
            FlawError: it is anything else.
        """
        value = self._find(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value)
        return value

    def factors(self, tensor: str, count: int) -> list[float] | None:
        """Positive factors of frequencies in a tensor, None if there is none.

        Raises:
            FlawError: there are not as many as there should be, or one is not positive.
        """
        values = self._read(tensor)
        if values is None:
            return None
        if values.shape != (count,) or not (np.isfinite(values).all() and (values > 0).all()):
            raise FlawError(f"its {tensor} are not {count} positive factors")
        return [float(value) for value in values]
