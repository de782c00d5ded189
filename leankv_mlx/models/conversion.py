"""A GGUF file as a folder that mlx-lm loads."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO

import numpy as np

from leankv_mlx.atomic import hold, read_text, remove_dead
from leankv_mlx.errors import ModelError
from leankv_mlx.models.architectures import model_of
from leankv_mlx.models.container import FlawError, open_file, read_header
from leankv_mlx.models.facts import Facts
from leankv_mlx.models.tensor_file import has_all
from leankv_mlx.models.weights import (
    DType,
    Look,
    go_on,
    layout,
    quantization,
    quantized_again,
    read_dense,
    write_weights,
)

VERSION = 1
"""Of what is written: raised when the same file becomes another folder."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ORIGIN = "gguf"
"""Entry of config.json that tells a folder of ours."""
_UNFINISHED = ".unfinished-"


def convert(path: Path, folder: Path, dtype: DType | None = None, look: Look = go_on) -> None:
    """Write the model of a GGUF file into a folder, which appears whole or not at all.

    Args:
        folder: does not exist yet, or is empty.
        dtype: of scales and dense weights; None for what holds the file's numbers exactly, which
            is float32 where they are products.
        look: called for every piece; may raise to stop.

    Raises:
        ModelError: the file is damaged or of a kind that is not read, the folder is there
            already, or it cannot be written.
    """
    scratch = folder.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
    try:
        with open_file(path) as file:
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder.parent)
            scratch.mkdir()
            held = hold(scratch)
            try:
                _write(file, scratch, dtype, look)
                os.rename(scratch, folder)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            finally:
                os.close(held)
    except FlawError as error:
        raise ModelError(f"cannot read {path}: {error}.") from error
    except ModelError as error:  # of its tokenizer
        raise ModelError(f"{path}: {error}") from error
    except OSError as error:
        way_out = "make room" if error.errno == ENOSPC else "check both"
        raise ModelError(
            f"cannot convert {path} into {folder}: {error.strerror or error}; {way_out}."
        ) from error


def remove_unfinished(place: Path) -> None:
    """Remove what writers that died have left in a folder; it may be the user's."""
    name = re.compile(re.escape(_UNFINISHED) + r"[0-9a-f]+")
    remove_dead(folder for folder in place.iterdir() if name.fullmatch(folder.name))


def is_whole(folder: Path) -> bool:
    """Whether a converted folder still has what `convert` wrote, without reading the weights."""
    try:
        config = json.loads(read_text(folder / CONFIG))
        again = config[ORIGIN]["quantized_again"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return False
    return isinstance(again, dict) and has_all(folder / WEIGHTS)


def inexact_line(path: Path, folder: Path) -> str:
    """What is not as in the file, for the user; "" if everything is.

    Args:
        folder: what `convert` made of it.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    again = config[ORIGIN]["quantized_again"]
    if not again:
        return ""
    kinds = ", ".join(f"{count} of type {kind}" for kind, count in again.items())
    return f"{path.name}: tensors that were quantized again, to 8 bits: {kinds}."


def _write(file: BinaryIO, folder: Path, dtype: DType | None, look: Look) -> None:
    from leankv_mlx.models.vocabulary import end_ids, tokenizer_files

    header = read_header(file)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise FlawError("it is one of several parts; join them with llama-gguf-split --merge")

    def small(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
        return read_dense(file, header.tensors[name]) if name in header.tensors else None

    model = model_of(Facts(header.metadata, small), header.tensors)
    layout(model, header.tensors, dtype)  # every type is known before anything is written
    files = dict(tokenizer_files(header.metadata))
    ends = end_ids(header.metadata)
    if len(header.metadata["tokenizer.ggml.tokens"]) > model.config["vocab_size"]:
        raise FlawError("its vocabulary is longer than its embedding")
    config = {**model.config, "eos_token_id": ends}
    if dtype is not None:
        config["torch_dtype"] = dtype
    if (quantized := quantization(model, header.tensors)) is not None:
        config["quantization"] = quantized
    config[ORIGIN] = {"quantized_again": quantized_again(model, header.tensors)}
    files[CONFIG] = json.dumps(config, indent=2)
    for name, text in files.items():
        with (folder / name).open("x", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
    write_weights(file, folder / WEIGHTS, model, header.tensors, dtype, look)
