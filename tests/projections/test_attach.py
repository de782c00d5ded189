"""A model whose own quantized layers compute through the operation, and the exact undo."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from leankv_mlx import projections
from leankv_mlx.projections import Input, Keep, Projections, Relaid, Weight, attach
from leankv_mlx.projections import attach as attach_function
from tests.cache.harness import tokens
from tests.models import TINY

IDS = tokens(24)[None]


def quantized(name: str = "llama", bits: int = 4, group: int = 32, mode: str = "affine") -> Any:
    model = TINY[name]()
    nn.quantize(model, group, bits, mode=mode)
    return model


@pytest.fixture
def model() -> Any:
    return quantized()


def parameters(model: nn.Module) -> dict[str, mx.array]:
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def same(found: dict[str, mx.array], wanted: dict[str, mx.array]) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == wanted[name].dtype and mx.array_equal(found[name], wanted[name])
        for name in wanted
    )


def relaid(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Relaid)]


def close(found: mx.array, wanted: mx.array) -> bool:
    return bool(mx.abs(found - wanted).max() <= 1e-5 * mx.abs(wanted).max())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss", "qwen3_next", "lfm2"])
def test_logits_are_those_of_mlx(name: str) -> None:
    model = quantized(name)
    wanted = model(IDS)
    with attach(model):
        assert relaid(model)
        assert close(model(IDS), wanted)
    assert not relaid(model)
    assert mx.array_equal(model(IDS), wanted)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_every_number_of_bits(bits: int) -> None:
    model = quantized(bits=bits)
    wanted = model(IDS)
    with attach(model):
        assert close(model(IDS), wanted)


def test_the_undo_is_exact(model: Any) -> None:
    modules, before = model.modules(), parameters(model)
    types, kept = [type(m) for m in modules], [dict(vars(m)) for m in modules]
    with attach(model):
        assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert [type(m) for m in modules] == types
    assert [vars(m) for m in modules] == kept
    assert same(parameters(model), before)


def test_again_and_again_changes_and_holds_nothing(model: Any) -> None:
    before = {name: mx.array(array) for name, array in parameters(model).items()}
    sizes = []
    for _ in range(100):
        with attach(model):
            mx.eval(model(IDS))
        mx.clear_cache()
        sizes.append(mx.get_active_memory())
    assert same(parameters(model), before)
    # What the tests before held may go meanwhile; nothing may be added.
    assert sizes[-1] - min(sizes[1:]) < 10_000


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_attachments_end_in_any_order(model: Any, order: tuple[int, ...]) -> None:
    before, wanted = parameters(model), model(IDS)
    uses = [attach(model), Projections(model, native=False), attach(model)]
    active = [use.start() for use in uses]
    for ended in order:
        active[-1].stop()  # twice is once
        active[-1].start()
        uses[ended].stop()
        active = [use for use in active if use is not uses[ended]]
        assert projections.is_attached(model) == (bool(active) and active[-1].native)
        assert bool(relaid(model)) == projections.is_attached(model)
        assert close(model(IDS), wanted)
    assert same(parameters(model), before)


def test_what_is_saved_is_mlxs_layout(model: Any, tmp_path: Path) -> None:
    before = parameters(model)
    with attach(model):
        assert same(parameters(model), before)
        model.save_weights(str(tmp_path / "attached.safetensors"))
    model.save_weights(str(tmp_path / "plain.safetensors"))
    assert same(*(mx.load(str(tmp_path / f"{n}.safetensors")) for n in ("attached", "plain")))


def test_weights_that_are_set_meanwhile_count_at_once_and_afterwards(model: Any) -> None:
    other = quantized("llama", bits=4)
    other.update({"model": {"norm": other.model.norm.parameters()}})
    other.layers[1].mlp.up_proj.scales *= 2
    wanted = other(IDS)
    with attach(model):
        mx.eval(model(IDS))
        model.load_weights(list(parameters(other).items()))
        assert close(model(IDS), wanted)
        assert type(model.layers[1].mlp.up_proj) is not nn.QuantizedLinear
    assert same(parameters(model), parameters(other))


def test_a_model_that_changes_its_dtype_meanwhile(model: Any) -> None:
    with attach(model):
        model.set_dtype(mx.float16)
        assert model(IDS).dtype == mx.float16
        model.set_dtype(mx.float32)
        assert model(IDS).dtype == mx.float32
    assert {x.dtype for x in parameters(model).values()} == {mx.float32, mx.uint32}


def test_scales_that_fit_16_bits_are_held_in_them(model: Any) -> None:
    wide = parameters(model)["model.layers.0.mlp.up_proj.scales"]
    with attach(model):
        assert model.layers[0].mlp.up_proj.relaid().scales.dtype == mx.float32  # they do not fit
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)
    before, wanted = parameters(model), model(IDS)
    assert not mx.array_equal(before["model.layers.0.mlp.up_proj.scales"], wide)
    with attach(model):
        assert model.layers[0].mlp.up_proj.relaid().scales.dtype.size == 2
        assert model(IDS).dtype == mx.float32
        assert close(model(IDS), wanted)
    assert same(parameters(model), before)


def test_a_layer_in_two_places_and_arrays_in_two_layers_stay_shared(model: Any) -> None:
    first, second, third = model.layers
    second.mlp = first.mlp
    third.mlp.up_proj.update(first.mlp.up_proj.parameters())
    before = model(IDS)
    with attach(model):
        assert second.mlp.up_proj is first.mlp.up_proj
        assert third.mlp.up_proj.relaid() is first.mlp.up_proj.relaid()
        assert first.mlp.up_proj.held.at is None  # of two layers
        assert close(model(IDS), before)
    assert second.mlp.up_proj is first.mlp.up_proj
    assert third.mlp.up_proj["weight"] is first.mlp.up_proj["weight"]


def test_what_is_left_alone_is_told() -> None:
    model = quantized()
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    wanted = model(IDS)
    with attach(model):
        rows = {row.name: row for row in projections.report(model)}
        assert "LoRALinear" in rows["model.layers.2.self_attn.q_proj.linear"].reason
        assert type(model.layers[2].self_attn.q_proj.linear) is nn.QuantizedLinear
        assert rows["model.layers.1.self_attn.q_proj"].reason == ""
        assert rows["model.layers.1.self_attn.q_proj"].at == Input(1, "attention")
        assert close(model(IDS), wanted)

    experts = quantized("gpt_oss")
    reasons = {row.reason for row in projections.report(experts)}
    assert "QuantizedSwitchLinear computes in its own way" in reasons

    other = quantized(mode="mxfp4")
    with attach(other):
        assert not relaid(other)
        assert all("mxfp4" in row.reason for row in projections.report(other))


def test_a_dense_model_has_nothing_to_report() -> None:
    model = TINY["llama"]()
    with attach(model):
        assert projections.report(model) == []


@pytest.mark.parametrize("outputs", [256, 20_096])
def test_weights_exist_once_and_one_layer_twice(outputs: int) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(512, outputs, bias=False) for _ in range(6)]

    model = Stack()
    nn.quantize(model, 32, 4)
    before = {name: mx.array(array) for name, array in parameters(model).items()}
    mx.eval(parameters(model), before)
    mx.clear_cache()
    held = mx.get_active_memory()
    layer = sum(x.nbytes for x in model.layers[0].values())
    use = attach(model)
    for change in (use.start, use.stop):
        mx.reset_peak_memory()
        change()
        assert mx.get_peak_memory() - held < 2 * layer + 100_000
        mx.clear_cache()
        assert abs(mx.get_active_memory() - held) < 10_000
    assert not relaid(model)
    assert same(parameters(model), before)


def test_copies_are_models_of_mlx(model: Any) -> None:
    wanted = model(IDS)
    with attach(model):
        other = copy.deepcopy(model)
        assert not relaid(other) and not projections.is_attached(other)
        assert mx.array_equal(other(IDS), wanted)


def test_a_lazy_one_relays_what_is_used(model: Any) -> None:
    before, wanted = parameters(model), model(IDS)
    with attach(model, lazy=True):
        layer = model.layers[0].mlp.up_proj
        assert layer.held.weight is None
        assert close(model(IDS), wanted)
        assert layer.held.weight is not None
    assert same(parameters(model), before)


def test_a_start_that_fails_leaves_the_model_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = parameters(model), itertools.count()
    relay = projections.layers.relay

    def failing(*args: Any) -> Weight:
        if next(calls) == 5:
            raise MemoryError
        return relay(*args)

    monkeypatch.setattr(projections.layers, "relay", failing)
    with pytest.raises(MemoryError):
        attach(model).start()
    assert not relaid(model) and not projections.is_attached(model)
    assert same(parameters(model), before)
    assert attach_function is projections.attach


class Watch:
    """Leaves out all channels of one input, and remembers what it saw."""

    def __init__(self, dropped: Input, watching: bool = False) -> None:
        self.dropped, self.watching = dropped, watching
        self.seen: list[tuple[Input, mx.array, int, mx.array | None]] = []

    def keep(self, at: Input, rows: int) -> Keep | None:
        assert rows == IDS.size
        return Keep(1e9) if at == self.dropped else None

    def saw(self, at: Input, x: mx.array, weights: Any, read: mx.array | None) -> None:
        self.seen.append((at, x, len(weights), read))


def test_inputs_are_asked_and_told(model: Any) -> None:
    watch = Watch(Input(1, "mlp_out"))
    wanted = model(IDS)
    with attach(model, watch):
        found = model(IDS)
        with attach(model):
            assert close(model(IDS), wanted)  # the inner one has no inputs
    names = {at for at, *_ in watch.seen}
    assert names == {
        Input(layer, place)
        for layer in range(3)
        for place in ("attention", "attention_out", "mlp", "mlp_out")
    }
    assert len(watch.seen) == 3 * 7
    (read,) = (read for at, _, _, read in watch.seen if at == watch.dropped)
    assert read is not None and read.item() == 0
    model.layers[1].mlp.down_proj.scales *= 0
    model.layers[1].mlp.down_proj.biases *= 0
    assert close(found, model(IDS))
