"""What was calibrated for a model, and its file in the user's folder.

A file is named by the profile that came with it, and says which model it is for: thresholds are
numbers about that model's weights and mean nothing for another one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from leankv_mlx.cache import container
from leankv_mlx.errors import CacheFileError, CalibrationError
from leankv_mlx.folders import folder
from leankv_mlx.projections.inputs import Input, Place
from leankv_mlx.projections.types import Keep
from leankv_mlx.settings import MOST_SPARSE, Sparse

By = Literal["teal", "wina"]
"""What a channel is judged by: |x| (TEAL, arXiv 2408.14690), or |x| times the norm of its column of
the weights (WINA, arXiv 2505.19427)."""

KIND = container.Kind("leankv-thresholds", 1, (), "file of thresholds")
_SUFFIX = ".safetensors"
_PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class Thresholds:
    """Of one model.

    Attributes:
        by: what they are for.
        shares: of the bytes of the weights, that can be left out; ascending.
        inputs: with how many channels each has.
        values: float32 [len(shares), len(inputs)].
        norms: of the columns, float32 [channels] for each input; empty with "teal".
        model: what tells it from others, see `mlx_lm.loading.fingerprint`.
        name: what to call it.
    """

    by: By
    shares: tuple[float, ...]
    inputs: dict[Input, int]
    values: NDArray[np.float32]
    norms: tuple[NDArray[np.float32], ...] = ()
    model: str = ""
    name: str = ""

    def only(self, shares: Collection[float]) -> Thresholds:
        """Without the other shares."""
        rows = [i for i, share in enumerate(self.shares) if share in shares]
        return replace(self, shares=tuple(self.shares[i] for i in rows), values=self.values[rows])

    def keeps(self, share: float) -> dict[Input, Keep]:
        """Which channels of each input take part, so that this share is left out."""
        row = self.values[self.shares.index(share)]
        found = {at: Keep(float(value)) for at, value in zip(self.inputs, row, strict=True)}
        for at, norm in zip(self.inputs, self.norms, strict=False):  # none with "teal"
            found[at] = found[at]._replace(norms=mx.array(norm))
        return found


def save(thresholds: Thresholds, name: str) -> Path:
    """Write them under a name, atomically; an older file of that name is replaced.

    Raises:
        CalibrationError: they cannot be written.
    """
    path = _path(name)
    inputs = [(at.layer, _PLACES.index(at.place), n) for at, n in thresholds.inputs.items()]
    tensors = {
        "inputs": mx.array(np.array(inputs, np.int32)),
        "thresholds": mx.array(thresholds.values),
    }
    if thresholds.norms:
        tensors["norms"] = mx.array(np.concatenate(thresholds.norms))
    texts = {
        "model": thresholds.model,
        "name": thresholds.name,
        "by": thresholds.by,
        "shares": json.dumps(thresholds.shares),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        container.write(path, tensors, texts, KIND)
    except OSError as error:
        raise CalibrationError(f"cannot write {path}: {error.strerror or error}.") from error
    except CacheFileError as error:
        raise CalibrationError(str(error)) from error
    return path


def find(model: str, called: str, sparse: Sparse) -> Thresholds:
    """The thresholds of a model that a setting names, or the latest that have its share.

    Args:
        model: its fingerprint.
        called: what to call it in a message.

    Raises:
        CalibrationError: there are none, or the file is damaged or of another model.
    """
    way_out = (
        f"run leankv calibrate {sparse.name or 'NAME'} --sparse {sparse.share:g} with this model"
    )
    if sparse.name:
        found = _load(_path(sparse.name), way_out)
        if found.model != model:
            raise CalibrationError(
                f"the thresholds '{sparse.name}' are for {found.name}, not for {called}; {way_out}."
            )
        candidates = [found]
    else:
        candidates = [_load(path, way_out) for path in _of_model(model)]
    for found in candidates:
        if sparse.share in found.shares:
            return found
    there = sorted({share for found in candidates for share in found.shares})
    have = f" (of its shares there are {', '.join(f'{x:g}' for x in there)})" if there else ""
    raise CalibrationError(f"{called} was not calibrated for sparse={sparse}{have}; {way_out}.")


def _path(name: str) -> Path:
    return folder("config") / "thresholds" / f"{name}{_SUFFIX}"


def _of_model(model: str) -> list[Path]:
    """The files of a model, the latest first."""
    found = []
    for path in (folder("config") / "thresholds").glob(f"*{_SUFFIX}"):
        with suppress(OSError, container.DamagedError):  # another model's, as far as anyone knows
            if container.read_metadata(path, KIND).get("model") == model:
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _load(path: Path, way_out: str) -> Thresholds:
    try:
        tensors, texts = container.read(path, KIND)
        return _checked(tensors, texts)
    except FileNotFoundError:
        raise CalibrationError(f"there are no thresholds '{path.stem}'; {way_out}.") from None
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or error}.") from error
    except (container.DamagedError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, container.DamagedError) else "it is damaged"
        raise CalibrationError(f"{path} cannot be used: {reason}; {way_out}.") from error


def _checked(tensors: dict[str, mx.array], texts: dict[str, str]) -> Thresholds:
    """What a file says, if it can be what `save` wrote."""
    by, shares = cast(By, texts["by"]), tuple(json.loads(texts["shares"]))
    inputs = dict(_inputs(np.array(tensors.pop("inputs"))))
    values = np.array(tensors.pop("thresholds"))
    _require(by in get_args(By))
    _require(all(isinstance(x, float) and 0 < x <= MOST_SPARSE for x in shares) and bool(shares))
    _require(values.shape == (len(shares), len(inputs)) and values.dtype == np.float32)
    _require(bool(np.isfinite(values).all() and (values >= 0).all()))
    norms: tuple[NDArray[np.float32], ...] = ()
    if by == "wina":
        flat = np.array(tensors.pop("norms"))
        _require(flat.shape == (sum(inputs.values()),) and flat.dtype == np.float32)
        _require(bool(np.isfinite(flat).all() and (flat >= 0).all()))
        norms = tuple(np.split(flat, np.cumsum([*inputs.values()])[:-1]))
    _require(not tensors)
    return Thresholds(by, shares, inputs, values, norms, texts["model"], texts["name"])


def _inputs(rows: NDArray[np.int32]) -> Iterator[tuple[Input, int]]:
    _require(rows.ndim == 2 and rows.shape[1] == 3 and rows.dtype == np.int32 and len(rows) > 0)
    _require(len({(layer, place) for layer, place, _ in rows.tolist()}) == len(rows))
    for layer, place, channels in rows.tolist():
        _require(layer >= 0 and 0 <= place < len(_PLACES) and channels > 0)
        yield Input(layer, _PLACES[place]), channels


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError
