"""Models by folder, GGUF file or hub id, or the bundled one; a failure is one line with the way
out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from leankv_mlx import terminal
from leankv_mlx.config import Products
from leankv_mlx.errors import ContextLengthError, ModelError
from leankv_mlx.folders import expanded
from leankv_mlx.mlx_lm.context import context_length
from leankv_mlx.mlx_lm.precision import compute_in_float32
from leankv_mlx.mlx_lm.projecting import is_native, projections_of
from leankv_mlx.models.container import has_magic
from leankv_mlx.models.conversion import ORIGIN
from leankv_mlx.models.kept import Note, kept
from leankv_mlx.models.weights import Look, go_on
from leankv_mlx.resources import demo_model

HUB_TIMEOUT_S = 5.0
"""How long to wait for the hub's first answer before saying that there is no network."""

# Training that goes on changes nearly every weight; hashing gigabytes at every start takes seconds.
_WHOLE_BYTES = 16 * 2**20
_SAMPLES, _SAMPLE_BYTES = 1024, 1024

_FOLDER = "_leankv_folder"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        tokenizer: mlx-lm's TokenizerWrapper.
        config: the content of config.json.
        path: its folder; that of a GGUF file has the file's name.
    """

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    path: Path


class Loaded(NamedTuple):
    """What mlx-lm's `load` returns with `return_config=True`."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]


def load(
    model: str | Path | None = None, projections: Products = "auto", **options: Any
) -> LoadedModel:
    """Load a model with mlx-lm.

    Args:
        model: a folder, a GGUF file, a hub id, or None for the bundled demo model.
        projections: what multiplies quantized weights, as in `CompressionConfig`.
        options: further arguments of `mlx_lm.load`.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    from mlx_lm import load as mlx_lm_load

    path = resolve_model(model)
    return LoadedModel(*load_from(mlx_lm_load, path, projections, **options), path)


def load_from(
    loader: Callable[..., Any], path: Path, projections: Products = "auto", **options: Any
) -> Loaded:
    """Call mlx-lm's `load` (or a namesake) on a folder; on the CPU the model then computes in
    float32, see `precision`, and its quantized layers through `projections`, for good. The bundled
    model stays bf16, which all that is said of it is about.

    Raises:
        BackendUnavailableError: native products are asked for and do not run here.
        ModelError: the files are damaged, or mlx-lm does not know this kind of model.
    """
    native = is_native(projections)
    try:
        loaded = Loaded(*loader(str(path), **{**options, "return_config": True}))
        _be_silent_about_length(loaded.tokenizer)
        # A GGUF file's numbers are kept exactly, in float32 where it takes that.
        half = getattr(mx, loaded.config["torch_dtype"]) if ORIGIN in loaded.config else None
        if half is not None and mx.default_device() == mx.gpu:
            loaded.model.set_dtype(half)
        object.__setattr__(loaded.model, _FOLDER, path)  # a plain attribute: no parameter
        if path != demo_model():
            lazy = options.get("lazy", False)
            compute_in_float32(loaded.model, lazy, half=half, projected=native)
            if native:
                projections_of(loaded.model, "native", lazy).start()
        return loaded
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot load the model in {path}: {_one_line(error)}") from error


def load_part(
    loader: Callable[..., Any],
    name: str,
    by_layers: bool,
    projections: Products = "auto",
    **options: Any,
) -> Loaded:
    """Call mlx-lm's `sharded_load` for this machine's part of a model, as `load_from` calls `load`.
    Of a model on the hub it fetches what the part needs, so that is left to it.

    Args:
        by_layers: whether the machines share the layers, not the heads.

    Raises:
        BackendUnavailableError: native products are asked for and do not run here.
        ModelError: there is no such model, it is damaged, or it cannot be split like this.
    """
    path = Path(name)
    if not _HUB_ID.fullmatch(name) or expanded(name).exists():
        path = resolve_model(name)
        if by_layers and not (path / _INDEX).is_file():
            raise ModelError(
                f"{name} has no {_INDEX}, which says where each layer is; drop --pipeline, "
                "or use a model that mlx_lm.convert made."
            )
    return load_from(loader, path, projections, **options)


def _be_silent_about_length(tokenizer: Any) -> None:
    """How long a prompt may be is checked where it is used, and a tokenizer's own limit is often
    not the model's; its warning of "indexing errors" comes once and not where this is set."""
    said = getattr(getattr(tokenizer, "_tokenizer", None), "deprecation_warnings", None)
    if isinstance(said, dict):
        said["sequence-length-is-longer-than-the-specified-maximum"] = True


def resolve_model(
    model: str | Path | None,
    tqdm_class: type | None = None,
    note: Note = terminal.note,
    look: Look = go_on,
) -> Path:
    """The folder of a model; a hub id is downloaded unless the hub's cache has it, and a GGUF file
    is converted unless our own cache has it.

    Args:
        tqdm_class: shows the progress of a download instead of the hub client's own bar.
        note: told what a user should know about a GGUF file.
        look: called now and then while one is converted; may raise to stop.

    Raises:
        ModelError: there is no such folder or file, it holds no model, or the hub does not give it.
    """
    if model is None:
        return _checked(demo_model())
    path = expanded(model)
    if path.is_dir():
        return _checked(path)
    if has_magic(path):
        return kept(path, note, look)
    if path.exists():
        raise ModelError(
            f"{model} is a file, but no GGUF file; "
            "give one, or the folder that holds config.json and weights."
        )
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise ModelError(f"no model folder {model}; check the path, or give a hub id (owner/name).")
    return _checked(_download(model, tqdm_class))


def folder_of(model: nn.Module) -> Path | None:
    """Where a model was loaded from here; None if it was not."""
    found: Path | None = getattr(model, _FOLDER, None)
    return found


def fingerprint(model: Path) -> str:
    """What tells the model in a folder from another one: its config, its weights' sizes, and the
    weights themselves at places all over each file (small files whole)."""
    digest = hashlib.blake2b((model / "config.json").read_bytes(), digest_size=16)
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for place in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _checked(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a model: it has no config.json.")
    if not any(path.glob("model*.safetensors")):
        raise ModelError(
            f"{path} has no weights (model*.safetensors); "
            "convert other formats with mlx_lm.convert."
        )
    return path


def _download(hub_id: str, tqdm_class: type | None = None) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    allowed = list(DEFAULT_ALLOW_PATTERNS)
    try:
        # Asked first, with a short timeout: without a network the download itself may retry long.
        HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise _gated(hub_id) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {hub_id}, and the hub has no such model "
            "(or it is private: log in with hf auth login)."
        ) from error
    except Exception as error:  # the hub's client passes on what its HTTP library raises
        if (cached := _cached(hub_id, allowed)) is not None:
            return cached
        raise ModelError(
            f"there is no folder {hub_id}, and the hub cannot be reached ({_one_line(error)}); "
            "check the network, or give a folder."
        ) from error
    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=allowed,
                etag_timeout=HUB_TIMEOUT_S,
                tqdm_class=tqdm_class,
            )
        )
    except errors.GatedRepoError as error:
        raise _gated(hub_id) from error
    except OSError as error:
        if error.errno != ENOSPC:
            raise _interrupted(hub_id, error) from error
        raise ModelError(
            f"the disk is full while {hub_id} is downloaded; make room and run it again."
        ) from error
    except Exception as error:  # network and permissions, each with a type of its own
        raise _interrupted(hub_id, error) from error


def _interrupted(hub_id: str, error: Exception) -> ModelError:
    return ModelError(
        f"the download of {hub_id} failed ({_one_line(error)}); run it again to continue."
    )


def _gated(hub_id: str) -> ModelError:
    return ModelError(
        f"{hub_id} is gated: accept its terms on its hub page, then log in with hf auth login."
    )


def _cached(hub_id: str, allowed: list[str]) -> Path | None:
    """The complete snapshot of an earlier download."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=allowed, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        return None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def check_context(config: Mapping[str, Any], prompt_tokens: int, max_tokens: int) -> int:
    """How many of `max_tokens` (-1 for no limit) the model's context has room for.

    Raises:
        ContextLengthError: the prompt alone fills the context or is longer.
    """
    length = context_length(config)
    if length is None:
        return max_tokens
    if prompt_tokens >= length:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and the model's context {length}; "
            "shorten the prompt or use a model with a longer context."
        )
    room = length - prompt_tokens
    return room if max_tokens < 0 else min(max_tokens, room)
