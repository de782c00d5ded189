"""The training scripts on tiny models; skipped where PyTorch is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from leankv_mlx.evaluation import prose, tasks  # noqa: E402
from training import tokenizer as tokenizers_  # noqa: E402
from training.data import Encoder, Stream, Weights  # noqa: E402
from training.export import export  # noqa: E402
from training.gates import FACTS, SUMMARY, Cell, measure, shared_start, table  # noqa: E402
from training.model import Llama, ModelConfig, generate  # noqa: E402
from training.optim import orthogonalized  # noqa: E402
from training.train import Progress, Trainer, rate, share  # noqa: E402

TINY = ModelConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    vocab_size=512,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_position_embeddings=1024,
)
CONFIG: dict[str, Any] = {
    "run": {"compile": False, "tokens": 100_000, "minutes": 600, "tokens_per_step": 600},
    "optimizer": {
        "muon_lr": 0.01, "adam_lr": 0.001, "decay": 0.01, "warmup_steps": 2, "hold": 0.5,
        "clip": 1.0,
    },
    "stages": [{"until": 1.0, "shortest": 200, "longest": 400}],
}  # fmt: skip
MIXTURE = {"text": 0.2, "dense": 0.2, "chat": 0.2, "task": 0.2, "recall": 0.2}
TEXT = prose.text(tasks.seeded("train", "text"), 100_000)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Tiny models are faster on one thread than on several that wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers_.write(tokenizers_.train(iter([TEXT]), TINY.vocab_size), 1024, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tokenizer: Path) -> Encoder:
    return Encoder(transformers.AutoTokenizer.from_pretrained(tokenizer))


def stream(encoder: Encoder, mixture: dict[str, float] = MIXTURE) -> Stream:
    weights = Weights(text=1.0, reply=5.0, document=0.2, dense=0.0)
    return Stream(encoder, TEXT, mixture, weights, seed=1)


def trainer(encoder: Encoder) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Llama(TINY), stream(encoder), CONFIG)


def test_the_tokenizer_splits_digits_and_keeps_text(encoder: Encoder) -> None:
    text = "The budget of the Oslo archive is 48213. Ünïcode, “quotes”\n\nand 7."
    assert encoder.decode(encoder.tokens(text)) == text
    assert len(encoder.tokens("48213")) == 5


def test_an_example_is_the_rendered_chat_and_its_weights_cover_the_replies(
    encoder: Encoder,
) -> None:
    turns = [("What is the code?", "The code is 123."), ("And the name?", "It is Ö.")]
    example = encoder.chat("A text.", turns, weight=0.0, reply=5.0)
    messages = [{"role": "user", "content": "Document:\nA text.\n\nWhat is the code?"}]
    messages += [{"role": "assistant", "content": "The code is 123."}]
    messages += [{"role": "user", "content": "And the name?"}]
    messages += [{"role": "assistant", "content": "It is Ö."}]
    assert example.ids == encoder.tokens(encoder.render(messages, prompt=False))
    marked = [i for i, w in zip(example.ids, example.weights, strict=True) if w]
    assert encoder.decode(marked) == "The code is 123.<|end|>It is Ö.<|end|>"
    assert set(example.weights) == {0.0, 5.0}
    first = example.weights.index(5.0)
    assert example.ids[:first] == encoder.prompt(messages[0]["content"])


def test_a_document_has_its_own_weight(encoder: Encoder) -> None:
    example = encoder.chat("A short text.", [("Why?", "So.")], weight=0.2, reply=5.0)
    marked = [i for i, w in zip(example.ids, example.weights, strict=True) if w == 0.2]
    assert encoder.decode(marked) == "A short text."


@pytest.mark.parametrize("kind", MIXTURE)
def test_every_kind_gives_examples_within_the_length(encoder: Encoder, kind: str) -> None:
    data = stream(encoder, {kind: 1.0})
    for index in range(8):
        example = data.draw(index, 300, 700)
        assert 2 <= len(example.ids) <= 700
        assert len(example.weights) == len(example.ids)
        assert any(example.weights)
        assert example == data.draw(index, 300, 700)


def test_an_unknown_kind_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        stream(encoder, {"nonsense": 1.0})


def test_a_cache_changes_nothing() -> None:
    torch.manual_seed(1)
    model, tokens = Llama(TINY), torch.randint(6, 500, (1, 24))
    whole, _ = model(tokens)
    hidden, cache = model(tokens[:, :20])
    parts = [hidden]
    for i in range(20, 24):
        hidden, cache = model(tokens[:, i : i + 1], cache)
        parts.append(hidden)
    assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-5)


def test_an_exported_folder_loads_and_mlx_lm_computes_the_same(
    tokenizer: Path, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    torch.manual_seed(2)
    model = Llama(TINY)
    for weight in model.parameters():  # large enough for rounding to show in the logits
        weight.data = (8 * weight.data if weight.ndim == 2 else weight.data).bfloat16().float()
    export(model, tokenizer, tmp_path)
    again = Llama.load(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    theirs, _ = mlx_lm.load(str(tmp_path))
    theirs.set_dtype(mx.float32)
    tokens = torch.randint(6, 500, (1, 50))
    with torch.no_grad():
        ours = model.logits(model(tokens)[0])
    logits = torch.tensor(theirs(mx.array(tokens.tolist())).tolist())
    assert torch.allclose(ours, logits, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


def test_a_resumed_run_takes_the_same_next_step(encoder: Encoder, tmp_path: Path) -> None:
    first = trainer(encoder)
    first.step()
    first.step()
    first.save(tmp_path / "checkpoint.pt")
    second = trainer(encoder)
    second.restore(tmp_path / "checkpoint.pt")
    assert second.progress == first.progress
    assert first.step() == second.step()
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_training_lowers_the_loss(encoder: Encoder) -> None:
    faster = {**CONFIG["optimizer"], "muon_lr": 0.05, "adam_lr": 0.01}
    run = Trainer(Llama(TINY), stream(encoder, {"text": 1.0}), {**CONFIG, "optimizer": faster})
    losses = [run.step() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3


def test_the_rate_warms_up_holds_and_ends_at_zero() -> None:
    settings = {"warmup_steps": 4, "hold": 0.5}
    assert rate(0.0, 0, settings) == 0.25
    assert rate(0.5, 10, settings) == 1.0
    assert rate(0.75, 10, settings) == 0.5
    assert rate(1.0, 10, settings) == 0.0
    assert share(Progress(tokens=50, seconds=30), {"tokens": 100, "minutes": 2}) == 0.5


def test_newton_schulz_makes_a_matrix_nearly_orthogonal() -> None:
    torch.manual_seed(3)
    for shape in [(24, 40), (40, 24)]:
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.4


def test_gates_score_between_zero_and_one_and_print(encoder: Encoder) -> None:
    torch.manual_seed(4)
    cells = tuple(Cell(task, 500) for task in ("S2", FACTS, SUMMARY))
    results = measure(Llama(TINY), encoder, cells, samples=1)
    assert all(0.0 <= results[cell.task][500] <= 1.0 for cell in cells)
    assert "chat summary" in table(results)


def test_a_summary_scores_up_to_its_first_slip() -> None:
    assert shared_start(list("abcd"), list("abcd")) == 1.0
    assert shared_start(list("abxd"), list("abcd")) == 0.5
    assert shared_start(list("abcdefgh"), list("abcd")) == 0.5


def test_generation_stops_at_its_limit() -> None:
    torch.manual_seed(5)
    assert len(generate(Llama(TINY), [1, 7, 8], limit=3, stop=-1)) == 3
