"""Layers of mlx-lm's models whose relaid weights work together: one row per kind of model.

A decode step of a small model spends much of its time between its products: in norms, additions and
activations, and in the Python that builds them. Here a layer is four operations and its attention:
norm, queries, keys and values; output and residual; norm, gate and up with the activation; down and
residual. What is not relaid (an adapter, a dense layer) runs as it is, in its place.

A row was made from functions of mlx-lm as they were read, and says so by their digest: where they
differ, the layer stays mlx-lm's.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from leankv_mlx.cache import BatchedKVCache, CompressedKVCache
from leankv_mlx.mlx_lm.patches import NAME as ATTENTION
from leankv_mlx.mlx_lm.patches import dispatches
from leankv_mlx.projections import Gate, Norm, Relaid, Weight, products
from leankv_mlx.projections.heads import NO_NORMS, Turn, heads

_OURS = (CompressedKVCache, BatchedKVCache)
_MODELS = "mlx_lm.models"
_PLAN = "_leankv_fused"


@dataclass(frozen=True)
class Row:
    """How the layers of one of mlx-lm's modules compute.

    Attributes:
        functions: digest of the functions that this stands for, see `digest`.
        gate: the activation.
        offset: what is added to the weights of norms.
        sandwich: attention and MLP are followed by a norm each.
        head_norms: queries and keys are normed by head.
        joined: queries, keys and values are one weight, gate and up another.
    """

    functions: str
    gate: Gate = "silu"
    offset: float = 0.0
    sandwich: bool = False
    head_norms: bool = False
    joined: bool = False


ROWS: dict[str, Row] = {
    "llama": Row("cb9fc5b8dfa8d2d5"),
    "qwen2": Row("4e5429e7e25c8590"),
    "qwen3": Row("c4c92d1d5c76ef8d", head_norms=True),
    "gemma3_text": Row(
        "b1b1187f2b8e0822", gate="gelu_approx", offset=1.0, sandwich=True, head_norms=True
    ),
    "phi3": Row("4375d6c9a849eef4", joined=True),
}
"""By the module that defines `TransformerBlock`, `Attention` and `MLP`."""


def fuse(model: nn.Module) -> Callable[[], None]:
    """Fuse the layers that a row knows and that have a relaid weight.

    Returns:
        What undoes it.
    """
    fused: list[weakref.ref[Any]] = []  # what a model holds must not hold its layers
    for block in model.modules():
        kind: Any = type(block)
        row = row_of(kind)
        if row is None or not _fits(block, row):
            continue
        object.__setattr__(block, _PLAN, _Plan(row, sys.modules[kind.__module__]))
        block.__class__ = _fused_class(kind)
        fused.append(weakref.ref(block))

    def undo() -> None:
        for found in fused:
            if (block := found()) is not None:
                block.__class__ = type(block).__bases__[1]
                object.__delattr__(block, _PLAN)

    return undo


def count(model: nn.Module) -> int:
    """How many layers of a model are fused now."""
    return sum(isinstance(module, _Fused) for module in model.modules())


def row_of(block: Any) -> Row | None:
    """The row of a class of layers, if it computes as the row says."""
    package, _, name = block.__module__.rpartition(".")
    row = ROWS.get(name) if package == _MODELS and block.__name__ == "TransformerBlock" else None
    if row is None or issubclass(block, _Fused) or digest(block) != row.functions:
        return None
    return row


@lru_cache
def digest(block: Any) -> str:
    """Of the source of what a class of layers computes; "" where there is none."""
    module = sys.modules[block.__module__]
    classes = [block, module.Attention, module.MLP]
    if norm := vars(module).get("RMSNorm"):
        classes.append(norm)
    try:
        source = "".join(inspect.getsource(cls.__call__) for cls in classes)
    except (OSError, TypeError):
        return ""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def _fits(block: Any, row: Row) -> bool:
    """Whether a layer has the parts that its class makes, and one of them is relaid."""
    module = sys.modules[type(block).__module__]
    if type(block.self_attn) is not module.Attention or type(block.mlp) is not module.MLP:
        return False
    return any(
        isinstance(part, Relaid) for part in (*block.self_attn.values(), *block.mlp.values())
    )


class _Plan:
    """How one layer runs: its row, and what was made of its weights."""

    def __init__(self, row: Row, module: Any) -> None:
        self.row = row
        self._module = module
        self.names = vars(module)  # attention is looked up at each call: it may be patched
        self.norm_type = self.names.get("RMSNorm", nn.RMSNorm)
        self._norms: dict[str, tuple[mx.array, Norm]] = {}
        self._turn: tuple[Any, Turn | None] = None, None

    def __deepcopy__(self, memo: object) -> _Plan:
        """Of a copy of the layer: nothing that was made of this one."""
        return _Plan(self.row, self._module)

    def norm(self, owner: Any, name: str) -> Norm | None:
        """A norm by its name; None if it is of another kind."""
        layer = owner[name]
        if type(layer) is not self.norm_type:
            return None
        weight, made = self._norms.get(name, (None, None))
        if made is None or weight is not layer["weight"] or made.eps != layer.eps:
            weight = layer["weight"]
            made = Norm(weight + self.row.offset if self.row.offset else weight, layer.eps)
            mx.eval(made.weight)  # it is kept, and what is lazy belongs to a thread
            self._norms[name] = weight, made
        return made

    def head_norms(self, attention: Any) -> tuple[Norm, Norm] | None:
        """Those of queries and keys, if `heads` knows them."""
        norms = self.norm(attention, "q_norm"), self.norm(attention, "k_norm")
        if norms[0] is None or norms[1] is None:
            return None
        both = norms[0], norms[1]
        return both if all(norm.weight.dtype == mx.float32 for norm in both) else None

    def turn(self, rope: Any) -> Turn | None:
        """What turns heads as this layer of mlx-lm does; None if it does more than that."""
        if self._turn[0] is not rope:
            self._turn = rope, _turn_of(rope)
        return self._turn[1]


def _turn_of(rope: Any) -> Turn | None:
    from mlx_lm.models.rope_utils import Llama3RoPE

    if type(rope) is nn.RoPE and not rope.traditional:
        return _usual_turn(rope.dims, rope.base, rope.scale)
    if type(rope) is Llama3RoPE and not rope.traditional:
        freqs = mx.reciprocal(rope._freqs)
        mx.eval(freqs)
        return Turn(freqs)
    return None


@lru_cache(maxsize=16)
def _usual_turn(dims: int, base: float, scale: float) -> Turn:
    half = dims // 2
    step = float(np.log(np.float32(base)) / np.float32(half))  # rounded as MLX does it
    freqs = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * step)
    mx.eval(freqs)
    return Turn(freqs, scale)


class _Fused:
    """What stands in for a `TransformerBlock`."""

    def __call__(
        self: Any, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        plan: _Plan = vars(self)[_PLAN]
        return _feed(self, plan, _attend(self, plan, x, mask, cache))


@lru_cache
def _fused_class(block: Any) -> type:
    names = {"__module__": block.__module__, "__qualname__": block.__qualname__}
    return type(block.__name__, (_Fused, block), names)


def _attend(block: Any, plan: _Plan, x: mx.array, mask: Any, cache: Any) -> mx.array:
    """x plus its attention: [B, L, K]."""
    attention = block["self_attn"]
    queries, keys, values = _queries_keys_values(block, plan, x)
    queries, keys = _turned(plan, attention, queries, keys, cache)
    values = _split(values, attention.n_kv_heads)
    attend = plan.names[ATTENTION]
    if type(cache) in _OURS and dispatches(attend):
        # It would ask the cache anyway; making arrays that nobody reads takes as long as that.
        out = cache.update(keys, values).attend(queries, scale=attention.scale, mask=mask)
    else:
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = attend(queries, keys, values, cache=cache, scale=attention.scale, mask=mask)
    batch, _, length, _ = out.shape
    if length > 1:
        out = out.transpose(0, 2, 1, 3)
    out = out.reshape(batch, length, -1)
    return _added(block, plan, "post_attention_layernorm", attention["o_proj"], out, x)


def _queries_keys_values(block: Any, plan: _Plan, x: mx.array) -> list[mx.array]:
    """[B, L, heads * D] each."""
    attention = block["self_attn"]
    if not plan.row.joined:
        layers = [attention["q_proj"], attention["k_proj"], attention["v_proj"]]
        return _normed(block, plan, "input_layernorm", layers, x)
    (out,) = _normed(block, plan, "input_layernorm", [attention["qkv_proj"]], x)
    first = attention.n_heads * attention.head_dim
    ends = [first, first + attention.n_kv_heads * attention.head_dim]
    return list(mx.split(out, ends, axis=-1))


def _turned(
    plan: _Plan, attention: Any, queries: mx.array, keys: mx.array, cache: Any
) -> tuple[mx.array, mx.array]:
    """Queries and keys by head, normed and at their positions: [B, heads, L, D]."""
    row, turn = plan.row, plan.turn(attention["rope"])
    offset: Any = 0
    if cache is not None:
        offset = cache.positions if type(cache) is BatchedKVCache else cache.offset
    if turn is not None and type(offset) in (int, list) and queries.dtype == mx.float32:
        norms = plan.head_norms(attention) if row.head_norms else NO_NORMS
        if norms is not None:
            dim = queries.shape[-1] // attention.n_heads
            return heads(queries, keys, dim, turn, offset, norms)
    queries = _split(queries, attention.n_heads)
    keys = _split(keys, attention.n_kv_heads)
    if row.head_norms:
        queries, keys = attention["q_norm"](queries), attention["k_norm"](keys)
    rope = attention["rope"]
    if type(offset) is list:
        offset = mx.array(offset)
    return rope(queries, offset=offset), rope(keys, offset=offset)


def _split(x: mx.array, count: int) -> mx.array:
    """[B, L, heads * D] -> [B, heads, L, D]."""
    batch, length = x.shape[:2]
    if length == 1:
        return x.reshape(batch, count, 1, -1)
    return x.reshape(batch, length, count, -1).transpose(0, 2, 1, 3)


def _feed(block: Any, plan: _Plan, x: mx.array) -> mx.array:
    """x plus what the MLP makes of it: [B, L, K]."""
    mlp, row = block["mlp"], plan.row
    before = "pre_feedforward_layernorm" if row.sandwich else "post_attention_layernorm"
    if row.joined:
        (out,) = _normed(block, plan, before, [mlp["gate_up_proj"]], x)
        hidden = _gated(plan, *mx.split(out, 2, axis=-1))
    else:
        (hidden,) = _normed(block, plan, before, [mlp["gate_proj"], mlp["up_proj"]], x, row.gate)
    return _added(block, plan, "post_feedforward_layernorm", mlp["down_proj"], hidden, x)


def _normed(
    block: Any,
    plan: _Plan,
    name: str,
    layers: Sequence[Any],
    x: mx.array,
    gate: Gate | None = None,
) -> list[mx.array]:
    """The products of layers with the norm of x; with a gate what it makes of both."""
    norm = plan.norm(block, name)
    taken = None if norm is None else _taken(layers, x, norm.weight)
    if taken is None:
        x = block[name](x)
        outs = [layer(x) for layer in layers]
        return outs if gate is None else [_gated(plan, *outs)]
    weights, biases = taken
    held = layers[0].held
    return products(held.home.inputs, held.at, x, weights, biases=biases, norm=norm, gate=gate)


def _added(
    block: Any, plan: _Plan, after: str, layer: Any, x: mx.array, residual: mx.array
) -> mx.array:
    """The residual plus the product of a layer with x, normed by `after` if the row says so."""
    if plan.row.sandwich:
        added: mx.array = plan.names["clip_residual"](residual, block[after](layer(x)))
        return added
    taken = _taken([layer], x, residual)
    if taken is None:
        return residual + cast(mx.array, layer(x))
    weights, biases = taken
    held = layer.held
    return products(held.home.inputs, held.at, x, weights, biases=biases, residual=residual)[0]


def _taken(
    layers: Sequence[Any], x: mx.array, other: mx.array
) -> tuple[list[Weight], list[mx.array | None]] | None:
    """Weights and biases of layers if all are relaid, and if what comes out has the dtype of x;
    `other` is multiplied with it or added."""
    dtype = x.dtype
    wide = dtype == mx.float32
    if not wide and other.dtype != dtype:
        return None
    weights, biases = [], []
    for layer in layers:
        if not isinstance(layer, Relaid) or not (wide or layer.held.dtype == dtype):
            return None
        weights.append(layer.relaid())
        biases.append(dict.get(layer, "bias"))
    return weights, biases


def _gated(plan: _Plan, gate: mx.array, up: mx.array) -> mx.array:
    out: mx.array
    out = plan.names["swiglu"](gate, up) if plan.row.gate == "silu" else nn.gelu_approx(gate) * up
    return out
