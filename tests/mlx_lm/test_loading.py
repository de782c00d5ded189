"""Loading models: every failure is a ModelError of one line, and nothing waits for a network."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, errors

from leankv_mlx.errors import ContextLengthError, ModelError
from leankv_mlx.mlx_lm import check_context, load, loading
from leankv_mlx.mlx_lm.loading import context_length, fingerprint, resolve_model
from leankv_mlx.resources import demo_model


def test_no_name_is_the_demo_model() -> None:
    loaded = load()
    assert loaded.path == demo_model()
    assert context_length(loaded.config) == 8192
    assert loaded.tokenizer.has_chat_template


def test_a_folder_is_loaded_by_path_or_text() -> None:
    assert resolve_model(demo_model()) == resolve_model(str(demo_model())) == demo_model()


def fails(name: str | Path, text: str) -> None:
    with pytest.raises(ModelError, match=text) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_what_is_no_model(tmp_path: Path) -> None:
    fails("/no/such/folder", "no model folder /no/such/folder")
    fails("nosuch", "no model folder nosuch")
    fails(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{}")
    fails(tmp_path, "no weights")
    fails(tmp_path / "config.json", "is a file")


def test_damaged_models(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(demo_model(), copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(copy, "cannot load the model")
    shutil.copy(demo_model() / "model.safetensors", weights)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"nosuch"'))
    fails(copy, "cannot load the model in .*nosuch")
    config.write_text("{")
    fails(copy, "cannot load the model")


class _Answer:
    """What the hub would answer with."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


def _http(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind("first line\nsecond line", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (_http(errors.GatedRepoError), "owner/name is gated"),
        (_http(errors.RepositoryNotFoundError), "the hub has no such model"),
        (_http(errors.HfHubHTTPError), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (TimeoutError(), "the hub cannot be reached"),
    ],
)
def test_the_hub_says_no(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "model_info", _Answer(error))
    fails("owner/name", text)


def test_a_closed_network_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    start = time.perf_counter()
    fails("owner/name", "the hub cannot be reached")
    assert time.perf_counter() - start < 10


def test_context_lengths() -> None:
    config = {"text_config": {"max_position_embeddings": 100}}
    assert check_context(config, 90, 5) == 5
    assert check_context(config, 90, 50) == 10
    assert check_context(config, 90, -1) == 10
    assert check_context({}, 10**6, 7) == 7
    for tokens in (100, 101):
        with pytest.raises(ContextLengthError, match=f"{tokens} tokens .* 100;"):
            check_context(config, tokens, 5)


def test_the_fingerprint_looks_into_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(loading, "_SAMPLES", 64)
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(3 * 10**6)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = fingerprint(tmp_path)
    for change in (slice(0, 1), slice(-1, None), slice(10**6, 10**6 + 10**5)):
        changed = bytearray(weights)
        changed[change] = b"x" * len(changed[change])
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert fingerprint(tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert fingerprint(tmp_path) == before
