"""How decode attention is spread over a GPU: measured once, else from a built-in table.

Lengths count in buckets of powers of two, and no choice is compiled for a length, so a growing
cache never waits for a compiler. The numbers of the table are estimates from the count of cores:
no GPU has measured them yet.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_path

from leankv_mlx.codec.format import TILE


@dataclass(frozen=True)
class Geometry:
    """Splits of a head, SIMD groups of a threadgroup, blocks that a SIMD group takes at a time."""

    splits: int
    simd_groups: int
    blocks: int


@dataclass(frozen=True)
class Shape:
    """What the choice depends on.

    Attributes:
        heads: KV heads, times the tiles that their query rows come in.
        head_dim: the larger of the stored channels of keys and values.
        slots: of the longest head, exact rows included.
    """

    heads: int
    head_dim: int
    slots: int

    @property
    def bucket(self) -> int:
        """The length, rounded up to a power of two of blocks."""
        return max(1, -(-self.slots // TILE) - 1).bit_length()


_THREADGROUPS = {"metal": 80, "cuda": 264}
"""Threadgroups that keep a GPU busy: two for each of 40 cores or 132 multiprocessors."""
_SIMD_GROUPS = {64: 8, 96: 8, 128: 8, 256: 4}
"""By head_dim at most; a threadgroup holds 32 KB on Metal."""
CANDIDATES = tuple(
    (splits, groups, blocks)
    for splits in (1, 2, 4, 8, 16, 32, 64)
    for groups in (4, 8)
    for blocks in (1, 2)
)


def built_in(kind: str, shape: Shape) -> Geometry:
    """The choice for a `kind` of GPU, "metal" or "cuda", that nobody measured."""
    groups = next((n for dim, n in _SIMD_GROUPS.items() if shape.head_dim <= dim), 4)
    blocks = 2 if shape.head_dim <= 128 else 1
    splits = max(1, round(_THREADGROUPS[kind] / shape.heads))
    # A split that has no block for each of its SIMD groups only costs the merge time.
    useful = max(1, 2**shape.bucket // (groups * blocks))
    return Geometry(min(splits, useful, 64), groups, blocks)


class Tuner:
    """Choices for one GPU, kept in a file."""

    def __init__(self, kind: str, device: str, path: Path | None = None) -> None:
        self.kind = kind
        self.device = device
        self.path = path or cache_file()
        self._measured = _load(self.path)
        self._fixed: Geometry | None = None  # while it is measured

    def choose(self, shape: Shape) -> Geometry:
        """What was measured for this shape's bucket, else the built-in choice."""
        return self._fixed or self._measured.get(self._key(shape)) or built_in(self.kind, shape)

    def tune(self, shape: Shape, run: Callable[[], None], repeats: int = 5) -> Geometry:
        """Time every candidate and keep the best, in the file too.

        Args:
            shape: whose bucket the result is for.
            run: does the work, with what `choose` says, and returns when it is done.
            repeats: of which the fastest counts.
        """

        def seconds(geometry: Geometry) -> float:
            self._fixed = geometry
            run()  # compile
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            return min(times)

        try:
            best = min((Geometry(*candidate) for candidate in CANDIDATES), key=seconds)
        finally:
            self._fixed = None
        self._measured[self._key(shape)] = best
        _save(self.path, self._measured)
        return best

    def _key(self, shape: Shape) -> str:
        return f"{self.device}/{shape.heads}/{shape.head_dim}/{shape.bucket}"


def cache_file() -> Path:
    """Where measured choices are kept."""
    return user_cache_path("leankv-mlx") / "geometry.json"


@lru_cache(maxsize=4)
def tuner(kind: str, device: str) -> Tuner:
    """The tuner of a GPU."""
    return Tuner(kind, device)


def _load(path: Path) -> dict[str, Geometry]:
    """A file that is missing, or not ours, is like one that is empty: it is only a cache."""
    try:
        rows = json.loads(path.read_text())
        return {key: Geometry(**row) for key, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(path: Path, measured: dict[str, Geometry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({key: asdict(g) for key, g in measured.items()}, indent=1))
    fresh.replace(path)
