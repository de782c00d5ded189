"""Where a course of learning is, in a file: what a killed run goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from leankv_mlx.cache import container
from leankv_mlx.errors import CacheFileError, CalibrationError
from leankv_mlx.folders import file_name, folder

KIND = container.Kind("leankv-learning", 1, (), "state of learning")


@dataclass(frozen=True)
class Checkpoint:
    """A place for the state of one course.

    Attributes:
        name: of what is learned.
        course: everything that the state depends on; that of another course is not taken.
    """

    name: str
    course: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its file, in the folder of caches."""
        return folder("cache") / "learning" / file_name(self.name, ".safetensors")

    def save(self, step: int, tensors: Mapping[str, mx.array]) -> None:
        """Keep the state after so many steps, atomically.

        Raises:
            CalibrationError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            container.write(self.path, tensors, {"course": self._text, "step": str(step)}, KIND)
        except OSError as error:
            reason = error.strerror or error
            raise CalibrationError(f"cannot write {self.path}: {reason}.") from error
        except CacheFileError as error:
            raise CalibrationError(str(error)) from error

    def load(self) -> tuple[int, dict[str, mx.array]] | None:
        """Steps that were done, and the state after them; None if there is none of this course."""
        with suppress(OSError, container.DamagedError, KeyError, ValueError):
            tensors, texts = container.read(self.path, KIND)
            if texts["course"] == self._text:
                return int(texts["step"]), tensors
        return None

    def remove(self) -> None:
        """The course is over."""
        self.path.unlink(missing_ok=True)

    @property
    def _text(self) -> str:
        return json.dumps(dict(self.course), sort_keys=True)
